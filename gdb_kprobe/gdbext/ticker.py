"""Something that is looked at again and again while the guest runs for the user, from its resume to its next stop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import gdb

from gdb_kprobe.errors import GuestStateError, KprobeError, ReportedError
from gdb_kprobe.gdbext.channel import is_running
from gdb_kprobe.gdbext.link import Link
from gdb_kprobe.gdbext.signals import uninterrupted


class Ticker:
    """Calls *look* every *interval* seconds until the guest stops; has it stopped when *look* says ``True``.

    Time begins when the guest is resumed: to arm very many probes takes seconds. A thread tells the time and nothing
    else: it posts an event, never a second one before the first was served, for gdb 13 crashes when it ends with many
    of them waiting. An error of *look* is shown, and stops the guest.
    """

    def __init__(self, link: Link, interval: float, look: Callable[[], bool]) -> None:
        self._link = link
        self._interval = interval
        self._look = look
        self._is_enough = False
        self._resumed: float | None = None
        self._over = threading.Event()
        self._posted = False
        self._thread = threading.Thread(target=self._tick, name="kprobe-ticker", daemon=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the guest was resumed; 0 before."""
        return 0.0 if self._resumed is None else time.monotonic() - self._resumed

    def run(self) -> None:
        """Have the guest run, and look. Under a front end that does not wait for the guest this returns at once.

        :raises GuestStateError: the guest runs already.
        :raises KprobeError: the guest was reset meanwhile, or is gone.
        """
        if is_running():
            raise GuestStateError("the guest runs already", "'interrupt' it first")
        # Called after the plugin's own, which arms the probes.
        gdb.events.cont.connect(self._on_resumed)
        gdb.events.stop.connect(self._on_end)
        gdb.events.gdb_exiting.connect(self._on_end)
        try:
            run(self._link)
        except BaseException:
            self._end()
            raise
        if not is_running():
            self._end()

    def _on_resumed(self, event: object) -> None:
        if self._resumed is None:
            self._resumed = time.monotonic()
            with uninterrupted():  # a new thread inherits the mask
                self._thread.start()

    def _end(self) -> None:
        """Look no more. Nothing happens the second time."""
        if self._over.is_set():
            return
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        gdb.events.cont.disconnect(self._on_resumed)
        gdb.events.stop.disconnect(self._on_end)
        gdb.events.gdb_exiting.disconnect(self._on_end)

    def _on_end(self, event: object) -> None:
        self._end()

    def _tick(self) -> None:
        due = time.monotonic()
        while True:
            due += self._interval
            if self._over.wait(max(0.0, due - time.monotonic())):
                return
            if not self._posted:
                self._posted = True
                gdb.post_event(self._on_tick)

    def _on_tick(self) -> None:
        self._posted = False
        if self._over.is_set() or self._is_enough:
            return
        if self._link.is_over:
            self._end()
            return
        try:
            self._is_enough = self._look()
        except ReportedError as error:
            gdb.write(f"kprobe: {error}\n", gdb.STDERR)
            self._is_enough = True
        if self._is_enough:
            self._link.interrupts.request()


def run(link: Link) -> None:
    """Have the guest of *link* run until it stops for the user, or until a Ctrl-C.

    :raises KprobeError: the guest was reset meanwhile, or is gone.
    """
    with contextlib.suppress(KeyboardInterrupt):
        gdb.execute("continue")
    if link.is_over:
        raise KprobeError("the guest is not attached any more", "'kprobe attach' again")
