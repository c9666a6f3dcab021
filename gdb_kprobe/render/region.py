"""What fills a region."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from gdb_kprobe.region.directory import RegionObject

_KIB = 1 << 10


def region_use(objects: Iterable[RegionObject], free: int) -> str:
    """The kinds of *objects*, the largest first, with the room that they have, and the *free* bytes."""
    sizes: Counter[str] = Counter()
    for found in objects:
        sizes[found.name] += found.size
    parts = [f"{name} {size // _KIB} KiB" for name, size in sizes.most_common()]
    return ", ".join([*parts, f"{free // _KIB} KiB free"])
