"""The guest's own kprobe events, through tracefs: many at once, which way they are hit, how often they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import VirtAddr
from kprobe_guest import GuestVm

_TRACING = "/sys/kernel/tracing"
_EVENTS = f"{_TRACING}/kprobe_events"
_PROFILE = f"{_TRACING}/kprobe_profile"
_GROUP = "bench"
_ENABLE = f"{_TRACING}/events/{_GROUP}/enable"
_OPTIMIZATION = "/proc/sys/debug/kprobes-optimization"
_NAMES = f"{_TRACING}/options/record-cmd"
"""While it is on, enabling an event also switches a jump label of the scheduler's, to record the names of tasks. With
several vCPUs, QEMU 7.2 may hang a guest that switches jump labels by itself."""
_LIST = "/sys/kernel/debug/kprobes/list"
_LOOKS = 100
"""A tenth of a second apart: the kernel optimizes late, and after it has seen every task sleep or leave."""


class Way(StrEnum):
    """How a kprobe of the kernel's is hit; the value is what its list says of it."""

    INT3 = ""
    OPTIMIZED = "[OPTIMIZED]"
    FTRACE = "[FTRACE]"


def functions_of(guest: GuestVm, command: str) -> tuple[VirtAddr, ...]:
    """The entries of the functions that the guest's function tracer sees while *command* runs, and namesakes."""
    guest.check_output(f"echo 0 >{_TRACING}/tracing_on; echo function >{_TRACING}/current_tracer")
    guest.check_output(f"echo 1 >{_TRACING}/tracing_on; {command}; echo 0 >{_TRACING}/tracing_on")
    names = guest.check_output(f"sed -n 's/.*: \\([^ ]*\\) <-.*/\\1/p' {_TRACING}/trace | sort -u").split()
    guest.check_output(f"echo nop >{_TRACING}/current_tracer; echo 1 >{_TRACING}/tracing_on")
    seen = set(names)
    symbols = (line.split() for line in guest.kallsyms().splitlines())
    return tuple(sorted(VirtAddr(int(addr, 16)) for addr, kind, name, *_ in symbols if kind in "tT" and name in seen))


@contextmanager
def events(guest: GuestVm, addrs: Sequence[VirtAddr], way: Way) -> Iterator[None]:
    """Have an enabled event at each of *addrs* that is hit in this *way*.

    :raises KprobeError: one cannot be, or is hit in another way.
    """
    with _enabled(guest, addrs, way):
        if addrs and (wrong := sorted(set(addrs) - set(_in_this_way(guest, addrs, way)))):
            raise KprobeError(f"the kernel's kprobes at {', '.join(map(hex, wrong))} are not {way.name}")
        yield


def possible(guest: GuestVm, addrs: Sequence[VirtAddr], way: Way) -> tuple[VirtAddr, ...]:
    """Those of *addrs* where an event is hit in this *way*."""
    with _enabled(guest, addrs, way):
        return _in_this_way(guest, addrs, way)


def hits(guest: GuestVm) -> int:
    """How often all events were hit, those included that the kernel missed."""
    return sum(recorded + missed for recorded, missed in _profile(guest))


def missed(guest: GuestVm) -> int:
    """How many hits of all events the kernel missed: their handler was not called."""
    return sum(missed for _, missed in _profile(guest))


def _profile(guest: GuestVm) -> list[tuple[int, int]]:
    lines = guest.check_output(f"cat {_PROFILE}").splitlines()
    return [(int(recorded), int(missed)) for _, recorded, missed in (line.split() for line in lines)]


@contextmanager
def _enabled(guest: GuestVm, addrs: Sequence[VirtAddr], way: Way) -> Iterator[None]:
    optimization, names = guest.check_output(f"cat {_OPTIMIZATION} {_NAMES}").split()
    places = " ".join(f"{addr:x}" for addr in addrs)
    try:
        guest.check_output(f"echo {int(way is Way.OPTIMIZED)} >{_OPTIMIZATION}; echo 0 >{_NAMES}")
        # An address that the kernel refuses has no event; whoever asked sees that in the list.
        guest.run(f"for at in {places}; do echo p:{_GROUP}/at_$at 0x$at >>{_EVENTS}; done 2>/dev/null")
        guest.run(f"[ ! -e {_ENABLE} ] || echo 1 >{_ENABLE}")
        yield
    finally:
        give_back = f"echo {optimization} >{_OPTIMIZATION}; echo {names} >{_NAMES}"
        guest.check_output(f"[ ! -e {_ENABLE} ] || echo 0 >{_ENABLE}; {give_back}; echo >{_EVENTS}")


def _in_this_way(guest: GuestVm, addrs: Sequence[VirtAddr], way: Way) -> tuple[VirtAddr, ...]:
    if way is Way.OPTIMIZED:
        # The number of those that are stands still when the optimizer is through.
        guest.check_output(
            f"last=-1; for look in $(seq {_LOOKS}); do sleep 0.3; now=$(grep -cF '{way}' {_LIST}); "
            f"[ $now = {len(addrs)} ] && break; [ $now -gt 0 -a $now = $last ] && break; last=$now; done"
        )
    listed: dict[int, Way] = {}
    for line in guest.check_output(f"cat {_LIST}").splitlines():
        addr, _, rest = line.partition(" ")
        listed[int(addr, 16)] = next((other for other in (Way.OPTIMIZED, Way.FTRACE) if other in rest), Way.INT3)
    return tuple(addr for addr in addrs if listed.get(addr) is way)
