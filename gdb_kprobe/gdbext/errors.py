"""Our exceptions to gdb's: the one place.

A ``gdb.GdbError`` reaches the user word for word, at the prompt and over MI; anything else that leaves a command is
announced by gdb as "Error occurred in Python", and is a bug of ours.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import gdb

from gdb_kprobe.errors import ReportedError
from gdb_kprobe.gdbext.settings import settings


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a :class:`ReportedError` into what gdb shows as a plain error message."""
    try:
        yield
    except ReportedError as error:
        if settings().verbose_errors:
            gdb.write(traceback.format_exc(), gdb.STDERR)
        raise gdb.GdbError(str(error)) from error
    except KeyboardInterrupt:
        raise gdb.GdbError(f"interrupted by Ctrl-C; {_standing()}") from None
    except gdb.error as error:
        # Said by gdb itself, of the connection or of something that it was asked to do.
        raise gdb.GdbError(str(error)) from error


def _standing() -> str:
    """What the guest is left doing, for a user who has ended a command."""
    if not isinstance(gdb.selected_inferior().connection, gdb.RemoteTargetConnection):
        return "gdb is connected to no guest"
    thread = gdb.selected_thread()
    if thread is not None and thread.is_running():
        return "the guest runs"
    return STOPPED


STOPPED = "gdb is connected, and the guest is stopped: 'continue' lets it run, 'detach' lets go of it"
"""What a user is told whom a command leaves so."""
