"""Completion on symbols and probe names."""

from __future__ import annotations

from gdb_kprobe.gdbext import plugin

_MOST = 500


def symbols(word: str) -> list[str]:
    """Functions of the guest that begin with *word*; nothing while not attached."""
    link = plugin.the_plugin().link
    return list(link.session.guest.match(word))[:_MOST] if link is not None and word else []


def probes(word: str) -> list[str]:
    """Names of probes that begin with *word*."""
    the_plugin = plugin.the_plugin()
    known = [*(the_plugin.link.session.probes if the_plugin.link else ()), *the_plugin.pending]
    return [probe.name for probe in known if probe.name.startswith(word)]
