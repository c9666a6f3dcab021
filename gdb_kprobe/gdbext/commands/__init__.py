"""The ``kprobe`` commands: one file for each, and this table of them."""

from __future__ import annotations

from gdb_kprobe.gdbext.commands import (
    add,
    adopt,
    attach,
    check,
    delete,
    detach,
    doctor,
    enable,
    info,
    list_,
    mi,
    plan,
    prefix,
    stats,
    symbols,
    trace,
    until,
)


def register() -> None:
    """Define all commands in gdb. Called once, by the plugin."""
    guests = (attach, adopt, doctor, detach)
    probes = (add, list_, info, plan, check, enable, delete, trace, stats, until, symbols)
    for module in (prefix, *guests, *probes, mi):
        module.register()
