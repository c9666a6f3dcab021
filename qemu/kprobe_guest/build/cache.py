"""Where built things are kept, and how they get there: complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kprobe_guest.errors import BuildError


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/gdb-kprobe``, made if need be."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "gdb-kprobe"
    path.mkdir(parents=True, exist_ok=True)
    return path


def progress(message: str) -> None:
    """One line on stderr for a step that takes more than a moment."""
    print(f"gdb-kprobe: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def build_lock() -> Iterator[None]:
    """Only one process builds at a time; the others wait and then find the result."""
    with (cache_directory() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """A temporary directory next to *final* that becomes *final* when the block ends well."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write *data* to *path* so that a reader sees the old or the new file, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
        file.write(data)
    Path(file.name).chmod(0o644)
    Path(file.name).rename(path)


def run_tool(command: Sequence[str], *, package: str, cwd: Path | None = None) -> str:
    """Run an external program and return its stdout as text.

    :raises BuildError: it is missing (then *package* is named) or failed.
    """
    return read_tool(command, package=package, cwd=cwd).decode(errors="replace")


def read_tool(command: Sequence[str], *, package: str, cwd: Path | None = None) -> bytes:
    """Run an external program and return its stdout.

    :raises BuildError: it is missing (then *package* is named) or failed.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},  # apt speaks the user's language, and we read what it says
        )  # fmt: skip
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed; run: sudo apt-get install {package}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").rstrip()
        raise BuildError(f"failed ({done.returncode}): {' '.join(command)}\n{said}")
    return done.stdout
