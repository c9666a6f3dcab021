"""The plugin: what lives as long as gdb does."""

from __future__ import annotations

from gdb_kprobe.gdbext.attachments import Attachments
from gdb_kprobe.gdbext.events import Events
from gdb_kprobe.gdbext.guard import ConnectionGuard
from gdb_kprobe.gdbext.steps import UserSteps
from gdb_kprobe.session.noted import NotedProbes


class Plugin:
    """The objects that live as long as gdb does; each owns what it changes."""

    def __init__(self) -> None:
        self.noted = NotedProbes()
        guard = ConnectionGuard()
        self.attachments = Attachments(self.noted, guard)
        self.steps = UserSteps(self.attachments)
        self.events = Events(self.attachments, guard, self.steps)


_plugin: Plugin | None = None


def the_plugin() -> Plugin:
    """The plugin of this gdb."""
    assert _plugin is not None, "create() was not called"
    return _plugin


def create() -> Plugin | None:
    """Make the plugin of this gdb; ``None`` when there is one already."""
    global _plugin
    if _plugin is not None:
        return None
    _plugin = Plugin()
    return _plugin
