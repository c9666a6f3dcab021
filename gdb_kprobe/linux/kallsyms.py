"""The guest's symbols, and the questions the kernel asks of them."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from fnmatch import translate as glob_to_regex
from functools import cached_property

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.kallsyms_table import SymbolTable
from gdb_kprobe.model import TEXT_TYPES, AddressRange, Symbol, VirtAddr


class _Sorted:
    """One table in address order; of aliases, the one that the kernel lists first comes first."""

    def __init__(self, table: SymbolTable) -> None:
        self.table = table
        # The core table is in this order already, for which this sort takes linear time.
        self.order = sorted(range(len(table.addrs)), key=table.addrs.__getitem__)
        self.addrs = array("Q", [table.addrs[index] for index in self.order])

    def index_at(self, addr: int) -> int | None:
        """Return the index of the symbol at or below *addr*."""
        position = bisect_right(self.addrs, addr) - 1
        if position < 0:
            return None
        return self.order[bisect_left(self.addrs, self.addrs[position])]

    def next_addr(self, addr: int) -> int | None:
        """Return the lowest symbol address above *addr*."""
        position = bisect_right(self.addrs, addr)
        return self.addrs[position] if position < len(self.addrs) else None


class Kallsyms:
    """The symbols of the core kernel and of its modules, as ``/proc/kallsyms`` shows them to root."""

    def __init__(self, core: SymbolTable, modules: Iterable[SymbolTable] = ()) -> None:
        self.tables = (core, *modules)

    def __len__(self) -> int:
        return sum(len(table.names) for table in self.tables)

    def __iter__(self) -> Iterator[Symbol]:
        for table in self.tables:
            for index in range(len(table.names)):
                yield _symbol(table, index)

    def with_modules(self, modules: Iterable[SymbolTable]) -> Kallsyms:
        """Return the same core symbols with these modules instead of the present ones."""
        other = Kallsyms(self.tables[0], modules)
        for name in ("_core_index", "_core_sorted"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def lookup(self, name: str) -> tuple[Symbol, ...]:
        """Return all symbols called *name*, the core kernel's first; names need not be unique."""
        found = [_symbol(self.tables[0], index) for index in self._core_index.get(name, ())]
        found += [_symbol(table, index) for table, index in self._modules_index.get(name, ())]
        return tuple(found)

    def find(self, name: str) -> VirtAddr | None:
        """Return the address of the core kernel's first symbol called *name*, or None."""
        indexes = self._core_index.get(name)
        return VirtAddr(self.tables[0].addrs[indexes[0]]) if indexes else None

    def address(self, name: str) -> VirtAddr:
        """Return the address of the core kernel's first symbol called *name*.

        :raises GuestStateError: this kernel has no such symbol.
        """
        found = self.find(name)
        if found is None:
            raise GuestStateError(
                f"the guest's kernel has no symbol {name}",
                "its configuration or version lacks what is asked for here (data symbols need CONFIG_KALLSYMS_ALL)",
            )
        return found

    def section(self, start: str, end: str) -> AddressRange | None:
        """Return the range between two marker symbols of the linker script, or None when this kernel lacks them."""
        first, last = self.find(start), self.find(end)
        return None if first is None or last is None or last < first else AddressRange(first, last)

    def symbol_at(self, addr: int) -> tuple[Symbol, int] | None:
        """Return the symbol that *addr* is in and the offset into it; of aliases, the first listed."""
        table = self._table_of(addr)
        if table is None:
            return None
        index = table.index_at(addr)
        if index is None:
            return None
        found = _symbol(table.table, index)
        return found, addr - found.addr

    def end(self, symbol: Symbol) -> VirtAddr:
        """Return where *symbol* ends: at the next higher symbol, or at the end of the memory it is in."""
        table = self._table_of(symbol.addr)
        if table is None:
            return symbol.addr
        window = next(window for window in table.table.ranges if symbol.addr in window)
        above = table.next_addr(symbol.addr)
        return window.end if above is None else VirtAddr(min(above, window.end))

    def size(self, symbol: Symbol) -> int:
        """Return the size of *symbol* in bytes, as far as the symbol table knows it."""
        return self.end(symbol) - symbol.addr

    def complete(self, prefix: str) -> list[str]:
        """Return the sorted names that begin with *prefix*, each once."""
        return sorted({name for table in self.tables for name in table.names if name.startswith(prefix)})

    def complete_text(self, prefix: str) -> list[str]:
        """Return the names of text symbols that begin with *prefix*, sorted; ``MODULE:`` leads to a module's."""
        module, colon, start = prefix.rpartition(":")
        front = module + colon
        found = {f"{table.module}:" for table in self.tables if table.module and not colon}
        for table in self.tables:
            if not colon or table.module == module:
                names = zip(table.names, table.types, strict=True)
                found.update(front + name for name, kind in names if kind in TEXT_TYPES and name.startswith(start))
        return sorted(name for name in found if name.startswith(prefix))

    def match(self, glob: str) -> Iterator[Symbol]:
        """Yield the symbols whose names match the shell pattern *glob*, in table order."""
        matches = re.compile(glob_to_regex(glob)).match
        for table in self.tables:
            for index, name in enumerate(table.names):
                if matches(name):
                    yield _symbol(table, index)

    @cached_property
    def _core_index(self) -> dict[str, list[int]]:
        index: dict[str, list[int]] = {}
        for position, name in enumerate(self.tables[0].names):
            if name in index:
                index[name].append(position)
            else:
                index[name] = [position]
        return index

    @cached_property
    def _modules_index(self) -> dict[str, list[tuple[SymbolTable, int]]]:
        found: dict[str, list[tuple[SymbolTable, int]]] = {}
        for table in self.tables[1:]:
            for position, name in enumerate(table.names):
                found.setdefault(name, []).append((table, position))
        return found

    @cached_property
    def _core_sorted(self) -> _Sorted:
        return _Sorted(self.tables[0])

    @cached_property
    def _modules_sorted(self) -> tuple[_Sorted, ...]:
        return tuple(_Sorted(table) for table in self.tables[1:])

    def _table_of(self, addr: int) -> _Sorted | None:
        """Return the table for *addr*: the core kernel's, or the module's whose memory it is in."""
        if any(addr in window for window in self.tables[0].ranges):
            return self._core_sorted
        for table in self._modules_sorted:
            if any(addr in window for window in table.table.ranges):
                return table
        return None


def _symbol(table: SymbolTable, index: int) -> Symbol:
    return Symbol(table.names[index], VirtAddr(table.addrs[index]), table.types[index], table.module)
