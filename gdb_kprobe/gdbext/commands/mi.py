"""MI twins of the commands, for programs: each answers with data instead of text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands.adopt import adopt_parser
from gdb_kprobe.gdbext.commands.arguments import check_stats, counted, stats_parser
from gdb_kprobe.gdbext.commands.attach import attach_parser, tell_waiting
from gdb_kprobe.gdbext.commands.base import ArgumentParser, naming
from gdb_kprobe.gdbext.errors import user_errors
from gdb_kprobe.model import Dispatch
from gdb_kprobe.render.stats import as_data
from gdb_kprobe.session.probes import Probe
from gdb_kprobe.session.stats import statistics


def _probe(probe: Probe) -> dict[str, str]:
    site = api.site(probe)
    return {
        "name": probe.name,
        "definition": str(probe.spec),
        "addr": "" if probe.place is None else hex(probe.place.at),
        "asked": "" if probe.place is None else hex(probe.place.addr),
        "bytes": "" if site is None else str(site.range.size),
        "place": "" if probe.place is None else str(probe.place),
        "state": api.state(probe),
        "rung": "" if site is None else site.rung,
        "family": "" if site is None else site.family,
        "insn": "" if site is None else str(site.insn),
        "hits": str(probe.hits),
        "missed": str(probe.missed),
        "saved": "" if site is None else str(int(site.is_saved)),
        "redirected": api.redirected(probe),
        "error": probe.last_error,
    }


def _attach(argv: list[str]) -> dict[str, Any]:
    """`guest` (its description), `region` (`virt`, `phys`, `size`), `messages`, `refused` (definitions that could not
    be armed, each with a `reason`), `seconds`.
    """
    args = attach_parser().parse_args(argv)
    profile = api.profile(args.profile, args.vmlinux)
    if args.wait:
        api.wait_for_kernel(profile, tell_waiting)
    attached = api.attach(profile, Dispatch(args.dispatch))
    region = api.region()
    return {
        "guest": api.guest().description,
        "region": {
            "virt": hex(region.range.start),
            "phys": hex(region.phys),
            "size": str(region.range.size),
        },
        "messages": list(attached.messages),
        "refused": [{"definition": str(probe.spec), "reason": str(reason)} for probe, reason in attached.refused],
        "seconds": f"{attached.seconds:.3f}",
    }


def _adopt(argv: list[str]) -> dict[str, Any]:
    """`probes` that were taken over, `refused` (definitions that could not be armed, each with a `reason`)."""
    args = adopt_parser().parse_args(argv)
    api.attach(api.profile(args.profile, args.vmlinux), Dispatch(args.dispatch))
    done = api.adopt()
    return {
        "probes": [_probe(probe) for probe in done.probes],
        "refused": [{"definition": text, "reason": str(reason)} for text, reason in done.refused],
    }


def _detach(argv: list[str]) -> dict[str, Any]:
    """`restored` (how many places), `unmapped` (whether the region is), `problems`, `notes`."""
    ArgumentParser("detach").parse_args(argv)
    done = api.detach()
    return {
        "restored": str(done.restored),
        "unmapped": str(int(done.unmapped)),
        "problems": list(done.problems),
        "notes": list(done.notes),
    }


def _add(argv: list[str]) -> dict[str, Any]:
    """`probe`."""
    if not argv:
        raise KprobeError("-kprobe-add: where? nothing was given", "for example: -kprobe-add p:open do_sys_openat2")
    return {"probe": _probe(api.add(" ".join(argv)))}


def _list(argv: list[str]) -> dict[str, Any]:
    """`probes`, the noted ones too."""
    ArgumentParser("list").parse_args(argv)
    return {"probes": [_probe(probe) for probe in api.probes()]}


def _plan(argv: list[str]) -> dict[str, Any]:
    """`plan`: `addr`, `asked`, `insn`, `rung`, `slot`, `old` and `new` (the bytes, in hex), `declined` (each better
    `rung` with its `reason`).
    """
    if not argv:
        raise KprobeError("-kprobe-plan: where? nothing was given", "for example: -kprobe-plan vfs_read+5")
    _, place, made = api.plan(" ".join(argv))
    return {
        "plan": {
            "addr": hex(place.at),
            "asked": hex(place.addr),
            "insn": f"{made.insn} ({made.family})",
            "rung": made.rung,
            "slot": hex(made.slot.code),
            "old": made.patch.old.hex(),
            "new": made.patch.new.hex(),
            "declined": [{"rung": rung, "reason": refusal.text} for rung, refusal in made.declined],
        }
    }


def _delete(argv: list[str]) -> dict[str, Any]:
    """`deleted`: names."""
    found = api.named(" ".join(argv), "-kprobe-delete")
    api.delete_many(found)
    return {"deleted": [probe.name for probe in found]}


def _enable(argv: list[str]) -> dict[str, Any]:
    """`probes`, as they are now."""
    return _switch(argv, True)


def _disable(argv: list[str]) -> dict[str, Any]:
    """`probes`, as they are now."""
    return _switch(argv, False)


def _switch(argv: list[str], enabled: bool) -> dict[str, Any]:
    found = api.named(" ".join(argv), f"-kprobe-{'enable' if enabled else 'disable'}")
    for probe in found:
        api.set_enabled(probe, enabled)
    return {"probes": [_probe(probe) for probe in found]}


def _stats(argv: list[str]) -> dict[str, Any]:
    """`tables`, each as a line of `kprobe stats --json`: one of totals, or with `--interval` as many as `--count`
    says.
    """
    args = stats_parser("stats").parse_args(argv)
    api.need_attached()
    probes = counted(args.names)
    check_stats(args)
    tables: list[dict[str, object]] = []
    if args.interval is None:
        tables.append(as_data(statistics(probes, None, api.counts(probes), args.top)))
    else:

        def tell(before: api.Reading, after: api.Reading) -> bool:
            tables.append(as_data(statistics(probes, before, after, args.top)))
            return len(tables) == (args.count or 1)

        with contextlib.suppress(KeyboardInterrupt):  # then those that there are
            api.sample(probes, args.interval, tell)
    return {"tables": [_strings(table) for table in tables]}


def _strings(value: object) -> Any:
    """*value* with its numbers as text: of a dictionary gdb takes nothing else."""
    if isinstance(value, dict):
        return {key: _strings(item) for key, item in value.items()}
    return [_strings(item) for item in value] if isinstance(value, list) else str(value)


class _MiCommand(gdb.MICommand):
    def __init__(self, name: str, function: Callable[[list[str]], dict[str, Any]]) -> None:
        self._name = f"-kprobe-{name}"
        super().__init__(self._name)
        self._function = function

    def invoke(self, argv: list[str]) -> dict[str, Any]:
        with user_errors(), naming(self._name):
            return self._function(argv)


COMMANDS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "attach": _attach,
    "adopt": _adopt,
    "detach": _detach,
    "add": _add,
    "list": _list,
    "plan": _plan,
    "delete": _delete,
    "enable": _enable,
    "disable": _disable,
    "stats": _stats,
}
"""What follows ``-kprobe-``, and what answers: the docstring of each says with what."""


def register() -> None:
    for name, function in COMMANDS.items():
        _MiCommand(name, function)
