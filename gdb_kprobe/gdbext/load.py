"""``source`` this file in gdb to load the plugin.

gdb's embedded Python knows nothing of the project's virtual environment, so its packages are put on the path here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def _prepare_path() -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = CHECKOUT / ".venv" / "lib" / version / "site-packages"
    for path in (CHECKOUT, packages):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    try:
        import capstone
        import yaml

        if importlib.util.find_spec("numpy") is None:  # it takes long to load, and is not always needed
            raise ModuleNotFoundError("No module named 'numpy'")
    except ImportError as error:
        # At this point neither our errors nor gdb's can be used: the message is all there is.
        raise SystemExit(
            f"gdb_kprobe: {error}. gdb embeds Python {version[6:]}; run {CHECKOUT}/install.sh, which makes a virtual "
            "environment for exactly that version."
        ) from error
    del capstone, yaml


_prepare_path()

from gdb_kprobe.gdbext import startup  # noqa: E402  # the path comes first

startup.load()
