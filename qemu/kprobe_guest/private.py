"""Files of a guest that are its owner's alone: they hold its memory, and its sockets give control over it."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from kprobe_guest.errors import LaunchError

UMASK = 0o077
"""What QEMU is started with, so that the files and sockets that it makes are of modes 0600 and 0700 at the most."""


def private_file(path: Path) -> Path:
    """Make *path* a new and empty file of mode 0600, whatever the umask; returns *path*.

    What had the name before is removed, never opened: it may be readable by others, or a link that others have made.

    :raises LaunchError: it belongs to another user, who may keep it there.
    """
    with contextlib.suppress(FileNotFoundError):
        _remove(path)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except OSError as error:
        raise LaunchError(f"cannot make {path}: {error.strerror}") from error
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
    return path


def private_directory(path: Path) -> Path:
    """Make the directory *path* with mode 0700, if it is not there; returns it as an absolute path.

    A directory that is there keeps its mode: it is the user's, and the files in it are private by themselves. Sockets
    that an earlier guest has left in it are removed.

    :raises LaunchError: all users may replace files in it.
    """
    path = path.absolute()
    if not path.is_dir():
        path.mkdir(mode=0o700, parents=True)
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise LaunchError(f"every user may replace files in {path}; take another directory, or 'chmod o-w {path}'")
    for leftover in path.iterdir():
        if leftover.is_socket():
            _remove(leftover)
    return path


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LaunchError(f"{path} is in the way, and cannot be removed: {error.strerror}") from error
