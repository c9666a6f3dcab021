"""``kprobe add``."""

from __future__ import annotations

import time

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import api, plugin
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, write


class Add(Command):
    """Add a probe and arm it.

    kprobe add [--disabled] [p[:NAME]] SYMBOL[+OFF]|MODULE:SYMBOL[+OFF]|0xADDR [ARG=%REG[:TYPE] ...] [if CONDITION]

    Registers have the kernel's names (%di, %si, %ax, %ip, %flags, %sp, %r8 ...), types are u8-u64, s8-s64, x8-x64.
    A condition is a C expression over registers and the probe's arguments.
    Before 'kprobe attach' the probe is only noted; it is armed when the guest is there.

    Example:
      kprobe add p:open do_sys_openat2 dfd=%di:s32 how=%dx if dfd != -100"""

    def run(self, argument: str) -> None:
        enabled = True
        if argument.split(maxsplit=1)[:1] == ["--disabled"]:
            enabled, argument = False, argument.split(maxsplit=1)[1] if " " in argument else ""
        if not argument:
            raise KprobeError("kprobe add: where? nothing was given", "'help kprobe add' has an example")
        if argument.split()[0].startswith("--"):
            raise KprobeError(f"kprobe add: unknown option {argument.split()[0]}", "only --disabled is known")
        add_definition(argument, enabled=enabled)

    def complete(self, text: str, word: str) -> list[str]:
        return complete.symbols(word)


def add_definition(text: str, *, enabled: bool = True) -> None:
    """Add the probe that *text* defines, and say what became of it."""
    started = time.monotonic()
    probe = api.add(text, enabled=enabled)
    taken = (time.monotonic() - started) * 1000
    link = plugin.the_plugin().link
    if link is None:
        write(f"{probe.name}: noted; it is armed by 'kprobe attach'.")
        return
    site = link.session.site_of(probe)
    assert site is not None
    state = f"armed, {site.plan.rung}" if probe.enabled else "disabled"
    write(f"{probe.name}: {probe.place} ({site.plan.insn}) {state}, in {taken:.0f} ms.")


def register() -> None:
    Add("add")
