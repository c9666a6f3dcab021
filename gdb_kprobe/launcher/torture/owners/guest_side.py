"""The guest's own owners of its functions, by its tracefs: one command a step, which tells all that was counted."""

from __future__ import annotations

from dataclasses import dataclass

from gdb_kprobe.launcher.torture.owners.steps import Step
from kprobe_guest import GuestVm

TRACING = "/sys/kernel/tracing"
GROUP = "owners"

_TIMEOUT = 120
_LIBRARY = "/tmp/owners.sh"
_FUNCTIONS = f"""\
cd {TRACING}
profile() {{
    while read -r name hits missed; do echo "$name $hits+$missed"; done <kprobe_profile
    read -r what number <per_cpu/cpu0/stats; echo "traced $number"
}}
define() {{ case $2 in
    f) echo "f:{GROUP}/$1 $3" >>dynamic_events;;
    *) echo "$2:{GROUP}/$1 $3+$4" >>kprobe_events;;
esac; echo "define $?"; }}
switch() {{ [ -e events/{GROUP}/$1 ] || return; profile; echo $2 >events/{GROUP}/$1/enable; echo "switch $?"; }}
remove() {{ [ -e events/{GROUP}/$1 ] || return; profile; echo "-:{GROUP}/$1" >>dynamic_events; echo "remove $?"; }}
tracer() {{
    if [ $1 = nop ]; then echo nop >current_tracer && echo >set_ftrace_filter
    else echo $2 >set_ftrace_filter && echo $1 >current_tracer; fi; echo "tracer $?"
}}
settle() {{
    for look in 1 2 3 4 5 6 7 8 9 10 11 12; do
        waits=
        while read -r at kind place flags; do case $flags in
            *OPTIMIZED*|*FTRACE*|*DISABLED*) ;;
            *) waits=yes;;
        esac; done </sys/kernel/debug/kprobes/list
        [ $waits ] || break
        usleep 100000
    done
}}
clear() {{
    [ ! -e events/{GROUP} ] || echo 0 >events/{GROUP}/enable; echo "off $?"
    profile; echo nop >current_tracer; echo >set_ftrace_filter
    echo >dynamic_events; echo "clear $?"; echo >trace
    while read -r at rest; do echo "left $rest"; done </sys/kernel/debug/kprobes/list
}}
has() {{ echo $1 >set_ftrace_filter; echo "filter $?"; echo >set_ftrace_filter; }}
"""


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the guest's that only *call*, of the program ``workload``, enters.

    *places* are where the two meet, as offsets of instructions.
    """

    name: str
    call: str
    places: tuple[int, ...]

    def place(self, number: str) -> int:
        """The offset of a place by its number, of which there may be fewer."""
        return self.places[int(number) % len(self.places)]

    def workload(self, times: str) -> str:
        number, _, arguments = self.call.partition(" ")
        return f"workload syscall {number} {times} {arguments}"


def prepare(guest: GuestVm) -> None:
    """Give a guest what :func:`take` runs."""
    # With names of tasks recorded, the guest switches a jump label of its scheduler (README, "Limits").
    guest.check_output(f"cat >{_LIBRARY} <<'END'\n{_FUNCTIONS}END\necho 0 >{TRACING}/options/record-cmd")


def take(guest: GuestVm, function: Function, step: Step) -> str:
    """Have the guest take its step; returns what it says: status, and what its own have counted."""
    return guest.run(f". {_LIBRARY}; {_command(function, step)}", _TIMEOUT)[1]


def _command(function: Function, step: Step) -> str:
    words = step.words
    match step.verb:
        case "call":
            return f"{function.workload(words[0])} >/dev/null; profile"
        case "guest.define":
            return f"define {words[0]} {words[1]} {function.name} {function.place(words[2])}"
        case "guest.enable":
            return f"switch {words[0]} 1"
        case "guest.disable":
            return f"switch {words[0]} 0"
        case "guest.remove":
            return f"remove {words[0]}"
        case "guest.tracer":
            return f"tracer {words[0]} {function.name}"
        case "guest.settle":
            return "settle"
        case "guest.clear":
            return "clear"
        case "guest.has":
            return f"has {function.name}"
        case other:
            raise AssertionError(f"not a step of the guest's: {other}")
