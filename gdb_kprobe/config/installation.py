"""Where the files are that come with the package: in a checkout, and where pip has installed it."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE.parent
"""A checkout, or the directory ``site-packages``."""

LOADER = _PACKAGE / "gdbext" / "load.py"
"""What gdb is told to ``source``."""

CONFIGS = next(
    (path for path in (_PACKAGE / "configs", _ROOT / "configs") if path.is_dir()),
    _PACKAGE / "configs",
)
"""The profiles that come with the package. The build puts the checkout's ``configs/`` into the package."""


def find_interpreter() -> str:
    """Return the path of a Python interpreter of this Python's version.

    gdb has its Python built in, and ``sys.executable`` need not be one. So the interpreter of the virtual environment
    that holds the packages is looked for first, then that of the installation of this Python.
    """
    installed = _ROOT.parents[2:3]  # ENVIRONMENT/lib/python3.N/site-packages
    for prefix in (_ROOT / ".venv", *installed, Path(sys.prefix)):
        for name in (f"python{sys.version_info.major}.{sys.version_info.minor}", "python3"):
            if (prefix / "bin" / name).exists():
                return str(prefix / "bin" / name)
    return sys.executable
