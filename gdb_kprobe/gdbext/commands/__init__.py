"""The ``kprobe`` commands: one file for each, and this table of them."""

from __future__ import annotations

from gdb_kprobe.gdbext.commands import (
    add,
    adopt,
    attach,
    check,
    delete,
    detach,
    enable,
    info,
    list_,
    mi,
    plan,
    prefix,
    stats,
    symbols,
    trace,
)


def register() -> None:
    """Define all commands in gdb. Called once, by the plugin."""
    commands = (prefix, attach, adopt, detach, add, list_, info, plan, check, enable, delete, trace, stats, symbols)
    for module in (*commands, mi):
        module.register()
