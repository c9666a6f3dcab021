"""The guest's own owners of its functions, by its tracefs: one line a step, which is answered by all that was counted.

A shell in the guest takes the steps. It starts a program only where it must: a guest under TCG spends more time on
that than on all that is looked at here. So who calls the function lives on from call to call.
"""

from __future__ import annotations

import base64
import gzip
from contextlib import ExitStack
from dataclasses import dataclass

from kprobe_guest import GuestError, GuestVm
from tests.support.live_patch import NAME as PATCH
from tests.torture.owners.steps import Step

TRACING = "/sys/kernel/tracing"
GROUP = "owners"

PATCHED = 0xFFFF_CFC7
"""What a function returns that is live-patched, and never else: it is neither a small number nor an error."""

_TIMEOUT = 120
_LIBRARY = "/tmp/owners.sh"
_ERRORS = "/tmp/errors"
_LOOKS = 1200
"""Times that the guest looks whether a live patch has come or gone, 50 ms apart."""
_SERVANT = f"""\
cd {TRACING}
said=
say() {{ said="$said $*"; }}
profile() {{
    while read -r name hits missed; do say "$name $hits+$missed"; done <kprobe_profile
    sum=0
    for cpu in per_cpu/cpu*; do read -r what number <$cpu/stats; sum=$((sum + number)); done
    say "traced $sum"
    [ -z "$bpf" ] || {{ echo >&6; read -r answer <&7; say "bpf $answer"; }}
}}
caller() {{
    workload syscall $number - $arguments <in$1 >out$1 6>&- 8>&- 4>&- &
    callers="$callers $!"
    [ $cpus = 1 ] || taskset -p $((1 << $1)) $! >/dev/null
}}
go_to() {{
    function=$1 filter=$2 number=$3; shift 3; arguments="$*"
    exec 8>&- 9<&- 4>&- 5<&-
    wait $callers; callers=
    cd /tmp; caller 0; exec 8>in0 9<out0
    [ $cpus = 1 ] || {{ caller 1; exec 4>in1 5<out1; }}
    cd {TRACING}
}}
tell() {{
    # Who of two made the last call is chance, and so is what that one returned.
    case $answer in *" {PATCHED}") ;; *) [ $cpus = 1 ] || answer=${{answer% *}};; esac
    say "$answer"
}}
call() {{
    echo $1 >&8; [ $cpus = 1 ] || echo $1 >&4
    read -r answer <&9; tell
    [ $cpus = 1 ] || {{ read -r answer <&5; tell; }}
    profile
}}
define() {{ case $2 in
    f) echo "f:{GROUP}/$1 $function" >>dynamic_events;;
    *) echo "$2:{GROUP}/$1 $function+$3" >>kprobe_events;;
esac; say "define $?"; }}
switch() {{ [ -e events/{GROUP}/$1 ] || return; profile; echo $2 >events/{GROUP}/$1/enable; say "switch $?"; }}
remove() {{ [ -e events/{GROUP}/$1 ] || return; profile; echo "-:{GROUP}/$1" >>dynamic_events; say "remove $?"; }}
tracer() {{
    if [ $1 = nop ]; then echo nop >current_tracer && echo >set_ftrace_filter
    else echo $filter >set_ftrace_filter && echo $1 >current_tracer; fi; say "tracer $?"
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
attach() {{
    [ -z "$bpf" ] || return
    workload bpf $1 $2 </tmp/bpf.in >/tmp/bpf.out 8>&- 4>&- &
    bpf=$!; exec 6>/tmp/bpf.in 7</tmp/bpf.out
    read -r answer <&7; say "bpf $answer"
    [ "$answer" = attached ] || release
}}
release() {{ [ -n "$bpf" ] || return; exec 6>&- 7<&-; wait $bpf; bpf=; }}
unbpf() {{ profile; release; }}
moved() {{
    look=0; state=
    while [ $look -lt {_LOOKS} ]; do
        look=$((look + 1)); state=0
        {{ read -r state <$at/transition; }} 2>/dev/null  # the patch may go at any moment
        [ $state = 1 ] || return 0
        usleep 50000
    done
    say "in transition"
}}
patch() {{
    at=/sys/kernel/livepatch/{PATCH}
    [ ! -e $at ] || return
    insmod /tmp/$function.ko; say "insmod $?"; moved
}}
unpatch() {{
    at=/sys/kernel/livepatch/{PATCH}
    [ -e $at ] || return
    echo 0 >$at/enabled; moved
    look=0
    until rmmod {PATCH} 2>/dev/null; do
        look=$((look + 1)); [ $look -lt {_LOOKS} ] || break
        usleep 50000
    done
    [ -e /sys/module/{PATCH} ] && say "the live patch stays"
}}
clear() {{
    [ ! -e events/{GROUP} ] || echo 0 >events/{GROUP}/enable; say "off $?"
    profile; release; unpatch
    echo nop >current_tracer; echo >set_ftrace_filter
    echo >dynamic_events; say "clear $?"; echo >trace
    while read -r at rest; do say "left $rest"; done </sys/kernel/debug/kprobes/list
}}
has() {{ echo $function >set_ftrace_filter; say "filter $?"; echo >set_ftrace_filter; }}
set -- per_cpu/cpu*; cpus=$#
while read -r line; do
    said=
    exec 2>{_ERRORS}
    $line
    while read -r line; do say "$line"; done <{_ERRORS}
    echo "$said"
done
"""


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the guest's that only *call*, of the program ``workload``, enters.

    *places* are where the two meet, as offsets of instructions; *number* is that of its record of ftrace's, *btf* that
    of its type, 0 if it has none.
    """

    name: str
    call: str
    places: tuple[int, ...]
    number: int
    btf: int = 0

    def place(self, number: str) -> int:
        """The offset of a place by its number, of which there may be fewer."""
        return self.places[int(number) % len(self.places)]


def prepare(guest: GuestVm, patches: dict[str, bytes]) -> None:
    """Give a guest, of which copies are made, what :class:`GuestSide` runs; *patches* are modules by their function."""
    # With names of tasks recorded, the guest switches a jump label of its scheduler (docs/limits.md).
    guest.check_output(f"echo 0 >{TRACING}/options/record-cmd; cd /tmp; mkfifo in0 out0 in1 out1 bpf.in bpf.out")
    files = {_LIBRARY: _SERVANT.encode(), **{f"/tmp/{name}.ko": data for name, data in patches.items()}}
    for path, data in files.items():
        text = base64.encodebytes(gzip.compress(data)).decode()
        guest.check_output(f"base64 -d <<'END' | gzip -d >{path}\n{text}END")


class GuestSide:
    """The owners within one guest; ended by :meth:`close`."""

    def __init__(self, guest: GuestVm, *, by_number: bool = False) -> None:
        """*by_number*: functions are named to ftrace by their number, which takes a tenth of the time."""
        self._guest = guest
        self._by_number = by_number
        self._runs = ExitStack()
        self._ask = self._runs.enter_context(guest.dialogue(f"sh {_LIBRARY}", _TIMEOUT))
        self._function: Function | None = None

    def close(self) -> None:
        """End what runs in the guest."""
        self._runs.close()

    def take(self, function: Function, step: Step) -> str:
        """Have the guest take its step; returns what it says: status, and what its own have counted.

        :raises GuestError: the guest is lost.
        """
        if function != self._function:
            named = function.number if self._by_number else function.name
            self._say(f"go_to {function.name} {named} {function.call}")
            self._function = function
        return self._say(_line(function, step))

    def answers(self) -> bool:
        """Have it say nothing."""
        return self._say("true") == ""

    def _say(self, line: str) -> str:
        said = self._ask(line)
        self._guest.check()
        if said.startswith(">>"):
            raise GuestError(f"the shell that takes the steps has ended at: {line}")
        return said.strip()


def _line(function: Function, step: Step) -> str:
    words = step.words
    match step.verb:
        case "call":
            return f"call {words[0]}"
        case "guest.define":
            return f"define {words[0]} {words[1]} {function.place(words[2])}"
        case "guest.enable":
            return f"switch {words[0]} 1"
        case "guest.disable":
            return f"switch {words[0]} 0"
        case "guest.remove" | "guest.tracer":
            return f"{step.verb.removeprefix('guest.')} {words[0]}"
        case "guest.bpf":
            return f"attach {words[0]} {function.btf}"
        case "guest.settle" | "guest.clear" | "guest.has" | "guest.patch" | "guest.unpatch" | "guest.unbpf":
            return step.verb.removeprefix("guest.")
        case other:
            raise AssertionError(f"not a step of the guest's: {other}")
