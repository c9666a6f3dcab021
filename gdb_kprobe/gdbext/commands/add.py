"""``kprobe add``."""

from __future__ import annotations

import difflib
import re
import time
from collections import Counter
from collections.abc import Collection

from gdb_kprobe.errors import KprobeError, NameTakenError, RefusedError
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, Progress, write
from gdb_kprobe.gdbext.output import unpaged

_PATTERN = re.compile(r"(?:\w+:)?[\w.]*[*?\[][\w.*?\[\]!-]*")
_DISABLED, _ALL = "--disabled", "--all-functions"
_MANY = 2000
"""From that many functions on, progress is shown."""


class Add(Command):
    """Add a kprobe and arm it.

    kprobe add [--disabled] [p[:NAME]] SYMBOL[+OFF]|MODULE:SYMBOL[+OFF]|0xADDR [ARG=%REG[:TYPE] ...] [if CONDITION]

    Registers have the kernel's names (%di, %si, %ax, %ip, %flags, %sp, %r8 ...), types are u8-u64, s8-s64, x8-x64.
    A condition is a C expression over registers and the probe's arguments.
    Before 'kprobe attach' the probe is only noted; it is armed when the guest is there. One on MODULE:SYMBOL waits
    for its module, and is armed when it is loaded, before its init runs.

    kprobe add [MODULE:]GLOB
    kprobe add --all-functions

    A shell pattern, or all: a probe at the entry of every function of that name. Those that cannot be probed are
    counted by reason. Ctrl-C undoes it.

    Example:
      kprobe add p:open do_sys_openat2 dfd=%di:s32 how=%dx if dfd != -100
      kprobe add 'vfs_*'"""

    def run(self, argument: str) -> None:
        enabled = True
        if argument.split(maxsplit=1)[:1] == [_DISABLED]:
            enabled, argument = False, argument.split(maxsplit=1)[1] if " " in argument else ""
        if not argument:
            raise KprobeError("kprobe add: where? nothing was given", "'help kprobe add' has an example")
        pattern = "*" if argument == _ALL else argument.strip("'\"")
        if pattern.startswith("--"):
            hint = f"{_DISABLED} and {_ALL} are known, one of them"
            raise KprobeError(f"kprobe add: unknown option {argument.split()[0]}", hint)
        if _PATTERN.fullmatch(pattern):
            if not enabled:
                raise KprobeError("kprobe add: --disabled is for one probe", "'kprobe disable' afterwards")
            add_matching(pattern)
            return
        add_definition(argument, enabled=enabled)

    def candidates(self, text: str) -> list[str]:
        first, *rest = text.split(maxsplit=1) or [""]
        if first == _DISABLED and text[len(first) :]:
            return complete.definition(rest[0] if rest else "")
        options = [_DISABLED, _ALL] if text == first else []
        return [*options, *complete.definition(text)]


def add_definition(text: str, *, enabled: bool = True) -> None:
    """Add the probe that *text* defines, and say what became of it."""
    started = time.monotonic()
    probe = api.add(text, enabled=enabled)
    taken = (time.monotonic() - started) * 1000
    if not api.is_attached():
        write(f"{probe.name}: noted; it is armed by 'kprobe attach'.")
        return
    site = api.site(probe)
    if site is None:
        write(f"{probe.name}: {_awaited(probe.spec.location.module, api.modules())}")
        return
    assert probe.place is not None
    state = f"armed, {site.rung}" if probe.enabled else "disabled"
    write(f"{probe.name}: {probe.place.in_full} ({site.insn}) {state}, in {taken:.0f} ms.")
    clones = api.clones(probe.place)
    if clones:
        write(f"Note: the compiler made others of this function, which are not probed by it: {', '.join(clones)}.")


def _awaited(module: str, loaded: Collection[str]) -> str:
    """What is said of a probe on *module*, which is not among those that are *loaded*."""
    near = difflib.get_close_matches(module, loaded, n=1)
    question = f" ({near[0]} is loaded: did you mean that?)" if near else ""
    return f"no module {module} is loaded{question}; it is armed when one of that name comes."


def add_matching(pattern: str) -> None:
    """Add probes at the functions that match, and say what became of them."""
    started = time.monotonic()
    tell = Progress(lambda done, of: f"{done} of {of} functions")

    def progress(done: int, of: int) -> None:
        if of >= _MANY:
            tell(done, of)

    with unpaged():
        armed, refused = api.add_matching(pattern, progress)
    taken = time.monotonic() - started
    each = taken * 1000 / (len(armed) + len(refused))
    write(f"{len(armed)} of {len(armed) + len(refused)} functions armed in {taken:.1f} s ({each:.2f} ms each).")
    reasons = Counter(_reason(error) for _, error in refused)
    for reason, count in reasons.most_common():
        write(f"  {count:6} refused: {reason}")


def _reason(error: KprobeError) -> str:
    match error:
        case RefusedError():
            return str(error.refusal.reason)
        case NameTakenError():
            return "a probe of that name is there already"
        case _:
            return error.message.split(":")[0]


def register() -> None:
    Add("add")
