"""Guests for tests: one running guest per spec, shared by the tests that ask for it, replaced when it was hurt.

Those of one spec are copies of one that was booted: kernel and modules are at the same addresses in all.

Which tests come before another is chance: each has to leave its guest as it was after boot.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings

from kprobe_guest import GuestSpec, GuestVm, Template
from kprobe_guest.cli import boot_command
from kprobe_guest.execution_log import KERNEL_TEXT

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

# Guests and templates cost memory: the least recently used one goes.
MOST_GUESTS = 6


@dataclass(frozen=True)
class Settled:
    """A guest that has come up, as it was saved then; *condition* is what it said of itself."""

    template: Template
    condition: tuple[str, ...]


class Templates:
    """Guests are copies of one that was booted: a boot takes ten times as long. The most recently used one is last."""

    def __init__(self) -> None:
        self._made: dict[GuestSpec, Settled] = {}

    def get(self, spec: GuestSpec) -> Settled | None:
        """What guests of this kind are copied from, booted if need be; ``None``: QEMU cannot save such a guest."""
        if spec.kernel == "bare" or spec.region == "ivshmem" or not spec.shared_ram or spec.accelerator != "tcg":
            return None
        booted = replace(spec, gdb="unix", extra_args=_other_than_log(spec.extra_args))
        settled = self._made.pop(booted, None)
        if settled is None:
            while len(self._made) >= MOST_GUESTS:
                self._made.pop(next(iter(self._made))).template.close()
            with GuestVm(booted) as guest:
                condition = _settled(guest)
                settled = Settled(Template(guest), condition)
        self._made[booted] = settled
        return settled

    def close(self) -> None:
        for settled in self._made.values():
            settled.template.close()
        self._made.clear()


def _other_than_log(words: tuple[str, ...]) -> tuple[str, ...]:
    """QEMU's arguments without those for its log, which are no matter of the machine's."""
    return () if words == KERNEL_TEXT else words


class GuestPool:
    """The guests, the most recently used one last. One that no test uses is stopped, and its clocks with it.

    The bare-metal guest is never idle: running, it takes a processor from the tests.
    """

    def __init__(self) -> None:
        self._guests: dict[GuestSpec, GuestVm] = {}
        self._conditions: dict[GuestSpec, tuple[str, ...]] = {}
        self._resting: set[GuestSpec] = set()
        self._templates = Templates()

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
            guest = self._new(spec)
        self._guests[spec] = guest
        return guest

    def _new(self, spec: GuestSpec) -> GuestVm:
        settled = self._templates.get(spec)
        guest = GuestVm(spec, saved=None if settled is None else settled.template.saved).__enter__()
        if settled is not None:
            self._conditions[spec] = settled.condition
        elif spec.kernel != "bare":
            self._conditions[spec] = _settled(guest)
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
        self._templates.close()


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
    return guest.alive() and guest.is_running()


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Unless a full run is wanted, leave out what takes minutes, and of live tests what only combines anew."""
    if os.environ.get("GDB_KPROBE_FULL"):
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; set GDB_KPROBE_FULL=1"))
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("live") and not item.get_closest_marker("full"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = {item for those in cases.values() for item in _combining_anew(those)}
    chosen = config.getoption("keyword") or any("[" in argument for argument in config.args)
    if left_out and not chosen:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _combining_anew(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Those of one test's *cases* that hold no value of a parameter that is not in another one, too."""
    held = {item: _values(item) for item in cases}
    missing = frozenset[tuple[str, str]]().union(*held.values())
    others = list(cases)
    while missing:
        # Of equals not always the first: a kernel is not to meet the same rung in all tests.
        best = max(others, key=lambda item: (len(held[item] & missing), zlib.crc32(item.nodeid.encode())))
        others.remove(best)
        missing -= held[best]
    return others if any(held.values()) else []


def _values(item: pytest.Item) -> frozenset[tuple[str, str]]:
    """What it has of each parameter; those that one mark gives together are one."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return frozenset()
    together: dict[str, str] = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if isinstance(mark.args[0], str) else ",".join(mark.args[0])
        together |= dict.fromkeys(names.replace(" ", "").split(","), names)
    found: dict[str, list[str]] = {}
    for name, value in callspec.params.items():
        found.setdefault(together.get(name, name), []).append(repr(value))
    return frozenset((names, ", ".join(values)) for names, values in found.items())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
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
