"""A place as text."""

from __future__ import annotations

from gdb_kprobe.guest.guest import Place
from gdb_kprobe.render.text import address, symbolic


def located(place: Place) -> str:
    """``0xffffffff81234567 (vfs_read+0x17)``, or ``0xffffffff81234555 (vfs_read+0x0 at +0x5)``: what is patched."""
    if place.symbol is None:
        return address(place.at)
    text = address(place.at, place.symbol.name, place.offset, place.symbol.module)
    return text[:-1] + f"{patched_at(place)})" if place.behind else text


def patched_at(place: Place) -> str:
    """``" at +0x5"``: which bytes of the function are patched, where those are not the ones at its own address."""
    return f" at +{place.offset + place.behind:#x}" if place.behind else ""


def traced(place: Place) -> str:
    """``vfs_read+0x0/0x370 [module]``, with the function's size; the bare address where no symbol covers it."""
    if place.symbol is None:
        return f"{place.addr:#x}"
    return symbolic(place.symbol.name, place.offset, place.end - place.start, place.symbol.module)
