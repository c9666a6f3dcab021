"""``gdb-kprobe gdbinit``: the line for ``~/.gdbinit`` that loads the plugin, after a look whether it does."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gdb_kprobe.config.installation import LOADER
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.launcher.verb import Verb

_PACKAGES = ("capstone", "numpy", "yaml")
"""Where these lie, gdb's Python has to look."""
_TIMEOUT = 120


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gdb", default="gdb", metavar="PROGRAM", help="the gdb that is to load it (gdb)")


def _run(options: argparse.Namespace) -> int:
    """Print the lines; gdb is started with them before."""
    source = f"source {LOADER}"
    # The packages are elsewhere when pip has installed the plugin with --editable, into another environment than .venv.
    paths = {str(Path(spec.origin).parents[1]) for spec in map(importlib.util.find_spec, _PACKAGES)
             if spec is not None and spec.origin is not None}  # fmt: skip
    path = f"python import sys; sys.path += {sorted(paths)!r}"
    said = ""
    for lines in ([source], [path, source]):
        output = _load(options.gdb, lines)
        if output is None:
            return 0
        said = said or output
    raise KprobeError(f"{options.gdb} does not load the plugin: {said}", _hint(options.gdb))


def _load(gdb: str, lines: Sequence[str]) -> str | None:
    """Have *gdb* load the plugin with *lines*, and print them if that works; else returns what gdb says."""
    words = [word for line in (*lines, "kprobe list") for word in ("-ex", line)]
    try:
        done = subprocess.run(
            [gdb, "-nx", "-q", "-batch", *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False,
        )  # fmt: skip
    except OSError as error:
        raise KprobeError(f"{gdb} cannot be started: {error.strerror}", "install gdb, or say --gdb PROGRAM") from error
    except subprocess.TimeoutExpired:
        raise KprobeError(f"{gdb} is silent for {_TIMEOUT} s when it loads the plugin", "try that by hand") from None
    if done.stdout != "no probes\n":
        return (done.stderr + done.stdout).strip()
    print("\n".join(lines))
    return None


def _hint(gdb: str) -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"gdb needs Python inside, of the version of the virtual environment, which is {version} here; "
        f"{gdb} -batch -ex 'python print(sys.version)' says which it has"
    )


VERB = Verb("print the line that loads the plugin into any gdb", _arguments, _run)
