"""Where gdb tells us that something happened: stops, lost connections, the end of gdb.

The order of things at a stop (gdb 13): first the user-defined ``hook-stop``, then gdb prints where the program is, then
Python's stop event. So it is in ``hook-stop`` that the machine is settled: what gdb prints is already right.
"""

from __future__ import annotations

import contextlib

import gdb

from gdb_kprobe.gdbext.events import Events
from gdb_kprobe.gdbext.signals import uninterruptible

HOOKS = {
    "hook-stop": "events.on_stop",
    "hook-detach": "events.before_detach",
    "hook-disconnect": "events.before_detach",
    "hook-kill": "events.before_detach",
    "hook-interrupt": "attachments.interrupt",
    "hook-stepi": "steps.before_stepi",
    "hook-nexti": "steps.before_step",
    "hook-step": "steps.before_step",
    "hook-next": "steps.before_step",
    "hook-until": "steps.before_step",
    "hook-jump": "events.before_move",
    "hook-return": "events.before_move",
    "hookpost-monitor": "events.after_monitor",
}
"""User-defined hook of gdb -> what of :class:`gdb_kprobe.gdbext.plugin.Plugin` it calls."""


def install(events: Events) -> None:
    """Define gdb's hooks (keeping what the user's own do) and connect to its events."""
    for hook, method in HOOKS.items():
        _define_hook(hook, f"python import gdb_kprobe.gdbext.plugin; gdb_kprobe.gdbext.plugin.the_plugin().{method}()")
    # A hook that the user defines after us replaces ours; then the event settles the machine, late but in time.
    gdb.events.stop.connect(lambda event: events.on_stop())
    # gdb 13 makes this event when it calls its threads running, which is before it sends the packet that resumes.
    gdb.events.cont.connect(uninterruptible(events.on_resumed))
    gdb.events.register_changed.connect(events.on_register)
    gdb.events.connection_removed.connect(lambda event: events.on_lost())
    # Twice: should gdb end while it ends (a SIGTERM during quit), the second one is not in use yet.
    gdb.events.gdb_exiting.connect(uninterruptible(events.on_exit))
    gdb.events.gdb_exiting.connect(uninterruptible(events.on_exit))


def _define_hook(hook: str, line: str) -> None:
    lines = [*_existing_hook(hook), line]
    if lines.count(line) == 1:
        gdb.execute(f"define {hook}\n" + "\n".join(lines) + "\nend", to_string=True)


def _existing_hook(hook: str) -> list[str]:
    with contextlib.suppress(gdb.error):
        text = gdb.execute(f"show user {hook}", to_string=True) or ""
        return [line.strip() for line in text.splitlines()[1:] if line.strip()]
    return []
