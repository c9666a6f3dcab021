"""Put the plugin into this gdb: settings, commands, hooks."""

from __future__ import annotations

from gdb_kprobe.gdbext import commands, frames, plugin, settings, stops


def load() -> None:
    """Register everything. Loading twice does nothing."""
    new = plugin.create()
    if new is not None:
        settings.register()
        commands.register()
        frames.register(new.attachments.original_of)
        stops.install(new.events)
