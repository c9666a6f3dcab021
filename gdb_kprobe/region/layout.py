"""What is where in a region.

::

    +0x0000  header, and at the end of its page what the guest reads of it, and the mark
    +0x1000  the directory's first page
    ...      the objects that the directory lists: data from the bottom up, code from the top down
    tables   the page tables that map all that; not mapped themselves

Code and data never share a page. How much of either there is depends on what is in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gdb_kprobe.model import PAGE_SIZE
from gdb_kprobe.system.paging import PMD_SIZE

DIRECTORY_OFFSET: Final = PAGE_SIZE
FIRST_PAGE: Final = 2
"""The first page that an object may have: header and directory are in front of it."""

MARK_SIZE: Final = 32
MARK_OFFSET: Final = PAGE_SIZE - MARK_SIZE
"""Where the mark is (:mod:`gdb_kprobe.region.generation`)."""

TABLE_CELL: Final = MARK_OFFSET - 8
"""Where the dispatcher in the guest reads which table it is to search; see
:func:`gdb_kprobe.kprobes.guest_dispatch.table_word`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets from the start of a region of *size* bytes."""

    size: int

    @property
    def end(self) -> int:
        """End of all that is mapped, start of the page tables: one of PTEs for each 2 MiB, and one a level above."""
        return self.size - (self.size // PMD_SIZE + 4) * PAGE_SIZE

    @property
    def pages(self) -> int:
        """Pages in front of the page tables, header and directory included."""
        return self.end // PAGE_SIZE
