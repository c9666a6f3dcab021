"""Ctrl-C and SIGTERM: never lost, and never in the middle of a dispatch.

Left to itself, gdb answers a SIGINT by sending the interrupt byte to the stub. When the stub has just stopped at our
breakpoint, it ignores that byte, the hit is handled, the guest resumed, and the Ctrl-C is gone. And a SIGINT that
comes while Python runs is raised as KeyboardInterrupt at a random place.

So while the guest runs, SIGINT is blocked in gdb's main thread and taken by a thread of ours. That asks for the stop
until it has happened, by the interrupt byte on gdb's own socket: a stopped stub ignores it, a running one stops, and
gdb shows the SIGINT that it knows. Where hits leave hardly a moment to it, the next dispatch makes the stop.

A SIGTERM is worse: gdb ends at the next packet that is sent, wherever that is. So it is held back, too, while we are at
work (gdb's worker threads never take it).
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

_WATCH = "kprobe-interrupts"
"""The thread that takes SIGINT."""
_SIGINT = {signal.SIGINT}
_HELD = {signal.SIGINT, signal.SIGTERM}
_LOOK_EVERY = 0.05
"""Seconds between two looks whether a stop was asked for otherwise than by a signal."""

_ASK_EVERY = 0.004
"""Seconds between two requests to stop: less than one hit takes."""

_PATIENCE = 0.3
"""Seconds after which the next dispatch makes the stop."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back. One that came meanwhile is delivered at the end, unless it was held back before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT through, as a KeyboardInterrupt: around code of the user's."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGINT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ctrl_c_is_pending() -> bool:
    """Whether a SIGINT is held back by :func:`uninterrupted`."""
    return signal.SIGINT in signal.sigpending()


def raise_ctrl_c() -> None:
    """Deliver a SIGINT that is held back.

    :raises KeyboardInterrupt: there is one.
    """
    if ctrl_c_is_pending():
        with interruptible():
            pass


def sigint_takers() -> dict[int, str]:
    """The threads that SIGINT may be given to, beside the main one and our own, which waits for it: number and name.

    The kernel gives a signal of the whole process to any thread that does not hold it back (kernel/signal.c,
    ``complete_signal``). A thread of Python's has the mask that the one has had which started it.
    """
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    ours = {os.getpid(), *(number for number, name in names.items() if name == _WATCH)}
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it may end meanwhile
            fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            number = int(task.name)
            if number not in ours and not int(fields["SigBlk"], 16) >> signal.SIGINT - 1 & 1:
                found[number] = names.get(number) or fields["Name"].strip()
    return found


def uninterruptible(function: Callable[[bool], None]) -> Callable[[object], object]:
    """Return a callback that calls *function* also when a KeyboardInterrupt comes, and tells it whether one did.

    gdb hands a Ctrl-C and a SIGTERM to Python as one, and Python raises it at whatever it does next: in a function that
    is being called, before its ``try`` is entered; in the ``__exit__`` of a ``with``. An exception that leaves a
    callback is printed by gdb and forgotten, and with it the event and the Ctrl-C. So this is a generator, which is
    resumed inside of its ``try`` and goes to sleep there; it calls nothing else.

    One that comes within *function*, or while an exception of it is printed, ends that and makes another call. The
    interpreter looks for signals where it calls, jumps back or resumes (``CHECK_PERIODIC`` in Python/bytecodes.c): so
    nothing is called outside of the ``try``.
    """

    def run() -> Generator[None, object, None]:
        interrupted = False
        problem: Exception | None = None
        while True:
            try:
                while True:
                    if problem is not None:  # one that left the generator would end it
                        printed = [problem]
                        problem = None
                        traceback.print_exception(printed.pop())
                    if not interrupted:
                        yield
                    now, interrupted = interrupted, False
                    function(now)
            except KeyboardInterrupt:
                interrupted = True
            except Exception as error:
                problem = error

    generator = run()
    next(generator)
    return generator.send


class InterruptWatch:
    """Takes SIGINT while the guest runs, and sees to it that the guest stops.

    *descriptor* is gdb's socket to the stub. All methods but the thread's own are for gdb's main thread.
    """

    def __init__(self, descriptor: int | None) -> None:
        # A duplicate: after a lost connection gdb's own number may soon be that of something else.
        self._descriptor = None if descriptor is None else os.dup(descriptor)
        self._main = threading.get_ident()
        self._lock = threading.Lock()
        self._mine = threading.Event()
        """Whether SIGINT is taken here: not while a command holds one back for itself, the guest stopped."""
        self._running = False
        self._requested: float | None = None
        self._over = False
        self._lent = False
        self._in_handler = False
        self._aside = threading.Event()
        self._thread: threading.Thread | None = None
        if descriptor is not None:
            with uninterrupted():  # a new thread inherits the mask
                self._thread = threading.Thread(target=self._watch, name=_WATCH, daemon=True)
                self._thread.start()

    @property
    def overdue(self) -> bool:
        """Whether the user has been waiting for the stop for too long."""
        asked = self._requested
        return asked is not None and (self._descriptor is None or time.monotonic() - asked > _PATIENCE)

    @property
    def is_requested(self) -> bool:
        """Whether a stop was asked for that has not come yet."""
        return self._requested is not None

    def request(self) -> None:
        """Ask for a stop, as Ctrl-C does; nothing happens unless the guest runs."""
        with self._lock:
            if self._running and self._requested is None:
                self._requested = time.monotonic()

    def resumed(self) -> None:
        """gdb has resumed the guest (also after each of our own stops)."""
        if self._thread is not None and not self._running:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGINT)
            with self._lock:
                self._running = True
            self._mine.set()

    def stopped(self) -> None:
        """The guest has stopped for the user. SIGINT stays with us until :meth:`release`."""
        with self._lock:
            self._running, self._requested = False, None

    def release(self) -> None:
        """Give SIGINT back to gdb."""
        self._mine.clear()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGINT)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let SIGINT through to the main thread, as a KeyboardInterrupt, while the guest runs on in the background.

        The thread has stood aside by then: waiting for the same signal, it would take some of them.
        """
        self._aside.clear()
        self._lent = True
        try:
            if self._thread is not None:
                self._aside.wait(_PATIENCE)
            with interruptible():
                yield
        finally:
            self._lent = False

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """Around a user's handler, at a hit: Ctrl-C is a KeyboardInterrupt in it, and is not taken for a stop.

        gdb is not asked to raise it. Within a breakpoint's ``stop`` it may take a SIGINT for its own, and not for
        Python's (``active_ext_lang`` in gdb/extension.c; seen with gdb 16 and two vCPUs): the handler would not end.
        """
        if self._thread is None or not self._mine.is_set():
            with interruptible():
                yield
            return
        interrupted = False
        self._in_handler = True
        try:
            yield
        finally:
            # One that was on its way may be raised here, and must not leave the handler's state behind.
            while self._in_handler:
                try:
                    with self._lock:
                        self._in_handler = False
                except KeyboardInterrupt:
                    interrupted = True
            if interrupted:
                raise KeyboardInterrupt

    def close(self) -> None:
        """End the thread."""
        self._over = True
        if self._thread is not None:
            self._thread.join()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.stopped()
        self.release()

    def _take(self) -> None:
        with self._lock:
            if self._in_handler:
                _thread.interrupt_main()
                return
        if self._mine.is_set():
            self.request()
        else:  # it was given back meanwhile
            signal.pthread_kill(self._main, signal.SIGINT)

    def _watch(self) -> None:
        while not self._over:
            every = _LOOK_EVERY if self._requested is None else _ASK_EVERY
            if self._lent:
                self._aside.set()
                time.sleep(every)
            elif not self._mine.wait(every):
                pass
            elif signal.sigtimedwait(_SIGINT, every) is not None:
                self._take()
            with self._lock:
                if self._requested is not None and self._descriptor is not None:
                    with contextlib.suppress(OSError):
                        os.write(self._descriptor, b"\x03")
