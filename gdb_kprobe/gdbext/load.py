"""``source`` this file in gdb to load the plugin.

gdb's embedded Python knows neither a checkout nor a virtual environment, so the packages that the plugin uses are put
on its path here: those that lie beside the plugin where pip has installed it, and those of the checkout's own virtual
environment.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

# Not __file__: where one script sources another, gdb leaves it the name of the outer one.
ROOT = Path(sys._getframe().f_code.co_filename).resolve().parents[2]
"""A checkout, or the directory ``site-packages``."""


def _prepare_path() -> None:
    embedded = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = ROOT / ".venv" / "lib" / f"python{embedded}" / "site-packages"
    for path in (ROOT, packages):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    # ENVIRONMENT/lib/python3.N/site-packages: what is compiled in there is for that version only.
    installed = re.search(r"/python(3\.\d+)/(?:site|dist)-packages$", str(ROOT))
    try:
        if installed is not None and installed[1] != embedded:
            raise ImportError(f"the plugin is installed for Python {installed[1]}")
        import capstone
        import yaml

        if importlib.util.find_spec("numpy") is None:  # it takes long to load, and is not always needed
            raise ModuleNotFoundError("No module named 'numpy'")
    except ImportError as error:
        # At this point neither our errors nor gdb's can be used: the message is all there is.
        raise SystemExit(f"gdb_kprobe: {error}. gdb embeds Python {embedded}; {_what_to_do(embedded)}.") from error
    del capstone, yaml


def _what_to_do(embedded: str) -> str:
    if (ROOT / "install.sh").exists():
        return f"run {ROOT}/install.sh, which makes a virtual environment for exactly that version"
    return (
        f"make a virtual environment with python{embedded}, have its pip install gdb-kprobe, and source the file that "
        "its 'gdb-kprobe gdbinit' prints"
    )


_prepare_path()

from gdb_kprobe.gdbext import startup  # noqa: E402  # the path comes first

startup.load()
