"""``kprobe symbols``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import plugin
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, write
from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.linux.symbol_file import symbol_file
from gdb_kprobe.linux.vmlinux import build_id_of
from gdb_kprobe.model import AddressRange


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
        link = plugin.the_plugin().need_link()
        guest = link.session.guest
        if not isinstance(guest, LinuxGuest):
            raise KprobeError("only a Linux guest has kallsyms", "use gdb's 'symbol-file'")
        path = Path(argument).expanduser() if argument else link.profile.kernel.vmlinux
        if path is None:
            with link.stopped():
                guest.refresh()  # modules may have come since the last look
                _load_kallsyms(guest)
            return
        found = build_id_of(path)
        if found != guest.build_id:
            raise KprobeError(
                f"{path} is not the guest's kernel: its build id is {found.hex()}, the guest's {guest.build_id.hex()}",
                f"the guest runs {guest.description}",
            )
        gdb.execute(f'symbol-file -o {guest.image.slide:#x} "{path}"', to_string=True)
        write(f"Loaded {path} with offset {guest.image.slide:#x}.")


def _load_kallsyms(guest: LinuxGuest) -> None:
    symbols = [symbol for symbol in guest.kallsyms if symbol.type not in "aA" and symbol.addr >= guest.image.base]
    image = AddressRange(guest.image.base, guest.image.end)
    text = list(guest.text_ranges())
    data = [AddressRange(end, image.end) for end in (window.end for window in text) if end in image]
    with tempfile.NamedTemporaryFile(prefix="kallsyms-", suffix=".elf") as file:
        file.write(symbol_file(symbols, text, data))
        file.flush()
        gdb.execute(f'symbol-file -readnow "{file.name}"', to_string=True)
    write(f"Loaded {len(symbols)} symbols of the guest's kallsyms.")


def register() -> None:
    Symbols("symbols")
