"""Our exceptions to gdb's: the one place.

A ``gdb.GdbError`` reaches the user word for word, at the prompt and over MI; anything else that leaves a command is
announced by gdb as "Error occurred in Python", and is a bug of ours.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext.settings import settings


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a :class:`KprobeError` into what gdb shows as a plain error message."""
    try:
        yield
    except KprobeError as error:
        if settings().verbose_errors:
            gdb.write(traceback.format_exc(), gdb.STDERR)
        raise gdb.GdbError(str(error)) from error
    except gdb.error as error:
        # Said by gdb itself, of the connection or of something that it was asked to do.
        raise gdb.GdbError(str(error)) from error
