"""``kprobe symbols``."""

from __future__ import annotations

from pathlib import Path

from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, write


class Symbols(Command):
    """Give gdb the kernel's symbols, at the right addresses.

    kprobe symbols [VMLINUX]

    Without an argument, and when the profile names no vmlinux, these are the guest's own kallsyms: names in
    backtraces, disassembly and breakpoints, no debug info. A vmlinux with debug info is moved by the KASLR slide; it
    must be the guest's kernel: the build ids are compared. Probes need neither.

    Example:
      kprobe symbols"""

    def candidates(self, text: str) -> list[str]:
        return complete.paths(text)

    def run(self, argument: str) -> None:
        loaded = api.load_symbols(Path(argument) if argument else None)
        if loaded.file is None:
            write(f"Loaded {loaded.count} symbols of the guest's kallsyms.")
        else:
            write(f"Loaded {loaded.file} with offset {loaded.offset:#x}.")


def register() -> None:
    Symbols("symbols")
