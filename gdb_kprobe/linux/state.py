"""How far the guest's kernel is: booting, running, going down, panicked."""

from __future__ import annotations

from dataclasses import dataclass

from gdb_kprobe.errors import GuestPanickedError, GuestStateError
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.linux.types import Types
from gdb_kprobe.target.protocols import Memory

_RUNNING = "SYSTEM_RUNNING"
_NO_CPU = -1


@dataclass(frozen=True, slots=True)
class GuestState:
    """*system_state* by its name in ``enum system_states``; *panic_cpu* is None unless the kernel has panicked."""

    system_state: str
    panic_cpu: int | None
    oops_in_progress: bool

    @property
    def is_running(self) -> bool:
        """Whether the kernel is up and well, so that probes can be armed."""
        return self.system_state == _RUNNING and self.panic_cpu is None

    def check_running(self) -> None:
        """Refuse a guest that is not up, or that has panicked.

        :raises GuestPanickedError: it has panicked.
        :raises GuestStateError: it is not up yet, or not any more.
        """
        if self.panic_cpu is not None:
            raise GuestPanickedError(
                f"the guest's kernel has panicked (on its CPU {self.panic_cpu})",
                "look at it with gdb's own commands; probes can be armed after a reset",
            )
        if self.system_state != _RUNNING:
            raise GuestStateError(
                f"the guest's kernel is not up: its system_state is {self.system_state}",
                "use 'kprobe attach --wait', or let the guest run and attach later",
            )


def read_state(memory: Memory, kallsyms: Kallsyms, types: Types) -> GuestState:
    """Read the state of the guest's kernel.

    :raises GuestStateError: this kernel lacks one of the variables.
    """
    value = _read_int(memory, kallsyms, "system_state")
    names = {number: name for name, number in types.enum("system_states").items()}
    # panic() takes panic_cpu before anything else, so it is set during a panic's very first output.
    panic_cpu = _read_int(memory, kallsyms, "panic_cpu")
    return GuestState(
        system_state=names.get(value, str(value)),
        panic_cpu=None if panic_cpu == _NO_CPU else panic_cpu,
        oops_in_progress=_read_int(memory, kallsyms, "oops_in_progress") != 0,
    )


def _read_int(memory: Memory, kallsyms: Kallsyms, name: str) -> int:
    return int.from_bytes(memory.read(kallsyms.address(name), 4), "little", signed=True)
