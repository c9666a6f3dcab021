"""Guests for tests: one running guest per spec, shared by the tests that ask for it, replaced when it was hurt.

Which tests come before another is chance: each has to leave its guest as it was after boot.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.cli import boot_command

# A shell has its background jobs ignore SIGINT, and what they start inherits that: the tests send Ctrl-C to themselves,
# to gdb and to the launcher, as from a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup does the same to SIGHUP, by which tests end gdb.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A machine that is busy with guests is slow at times; how long an example takes proves nothing.
settings.register_profile("guests", deadline=None)
settings.load_profile("guests")

BootedGuest = Callable[[GuestSpec], GuestVm]

# Guests cost memory: the least recently used one goes.
MOST_GUESTS = 6


class GuestPool:
    """The guests, the most recently used one last. One that no test uses is stopped, and its clocks with it.

    The bare-metal guest is never idle: running, it takes a processor from the tests.
    """

    def __init__(self) -> None:
        self._guests: dict[GuestSpec, GuestVm] = {}
        self._conditions: dict[GuestSpec, tuple[str, ...]] = {}
        self._resting: set[GuestSpec] = set()

    def get(self, spec: GuestSpec) -> GuestVm:
        """A healthy, running guest of this kind: the one there is, or a new one."""
        guest = self._guests.pop(spec, None)
        if spec in self._resting:
            self._resting.discard(spec)
            if guest is not None and guest.alive():
                guest.cont()
        if guest is not None and not _usable(guest):
            guest.close(keep=True)
            guest = None
        if guest is None:
            while len(self._guests) >= MOST_GUESTS:
                self._guests.pop(next(iter(self._guests))).close()
            self._guests[spec] = GuestVm(spec).__enter__()
            if spec.kernel != "bare":
                self._conditions[spec] = _settled(self._guests[spec])
            return self._guests[spec]
        self._guests[spec] = guest
        return guest

    def check(self, guest: GuestVm) -> None:
        """Fail if *guest* has failed, or runs and is not as it was after boot.

        A program that was killed has a moment to end.
        """
        guest.check()
        condition = self._conditions.get(guest.spec)
        if condition is None or not _usable(guest):
            return
        deadline = time.monotonic() + 3
        while (now := guest.condition()) != condition and time.monotonic() < deadline:
            time.sleep(0.1)
        assert now == condition, "the test has left its guest changed: others may get it"

    def rest(self, guest: GuestVm) -> None:
        """Stop *guest* until the next test wants it, if it runs, and is one that can be wanted."""
        if self._guests.get(guest.spec) is guest and _usable(guest):
            guest.stop()
            self._resting.add(guest.spec)

    def discard(self, guest: GuestVm) -> None:
        """End a guest that a failed test has used, and keep its logs."""
        self._guests = {spec: other for spec, other in self._guests.items() if other is not guest}
        self._resting &= self._guests.keys()
        guest.close(keep=True)

    def close(self) -> None:
        for guest in self._guests.values():
            guest.close()
        self._guests.clear()


def _settled(guest: GuestVm) -> tuple[str, ...]:
    """The condition of a guest that has just come up: what its init has started may still be on its way."""
    condition = guest.condition()
    for _ in range(20):
        time.sleep(0.1)
        before, condition = condition, guest.condition()
        if condition == before:
            break
    return condition


def _usable(guest: GuestVm) -> bool:
    if not guest.alive():
        return False
    status = guest.qmp("query-status")
    assert isinstance(status, dict)
    return bool(status["running"])


@pytest.fixture(scope="session")
def guest_pool() -> Iterator[GuestPool]:
    pool = GuestPool()
    yield pool
    pool.close()


_USED = pytest.StashKey[list[GuestVm]]()
_FAILED = pytest.StashKey[bool]()


@pytest.fixture
def booted_guest(guest_pool: GuestPool, request: pytest.FixtureRequest) -> Iterator[BootedGuest]:
    """A function from a :class:`GuestSpec` to a running guest.

    The guest may have served other tests before. Afterwards its console must show no failure, and it must be as it was
    after boot. A failed test's guest is not used again.
    """
    used: list[GuestVm] = []
    request.node.stash[_USED] = used

    def boot(spec: GuestSpec) -> GuestVm:
        guest = guest_pool.get(spec)
        used.append(guest)
        return guest

    yield boot
    with contextlib.ExitStack() as rest:
        for guest in dict.fromkeys(used):
            rest.callback(_give_back, guest_pool, guest, failed=request.node.stash.get(_FAILED, False))


def _give_back(pool: GuestPool, guest: GuestVm, *, failed: bool) -> None:
    if failed or not guest.alive():
        pool.discard(guest)
        return
    try:
        pool.check(guest)
    except BaseException:
        pool.discard(guest)
        raise
    pool.rest(guest)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("GDB_KPROBE_FULL"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; set GDB_KPROBE_FULL=1"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # the value sent back is the report
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
        for guest in item.stash.get(_USED, []):
            text = (
                f"artefacts: {guest.directory}\nthe same guest by hand: {boot_command(guest.spec)}\n"
                f"end of the console:\n{guest.console_tail()}"
            )
            report.sections.append((f"guest {guest.spec.label()}", text))
    return report
