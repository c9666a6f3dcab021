"""The part of the Python API that gives gdb the kernel's symbols."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext.plugin import the_plugin
from gdb_kprobe.guest.linux import LinuxGuest
from gdb_kprobe.linux.symbol_file import symbol_file
from gdb_kprobe.linux.vmlinux import build_id_of
from gdb_kprobe.model import AddressRange


@dataclass(frozen=True, slots=True)
class LoadedSymbols:
    """What :func:`load_symbols` has given gdb.

    :ivar file: the vmlinux; ``None``: the guest's own kallsyms.
    :ivar offset: how many bytes the file's addresses were moved by.
    :ivar count: the symbols of kallsyms; 0 of a file.
    """

    file: Path | None
    offset: int
    count: int


def load_symbols(vmlinux: Path | None = None) -> LoadedSymbols:
    """Give gdb the kernel's symbols at the right addresses, in place of those it had.

    :param vmlinux: the kernel's file; ``None``: the one that the profile names, else the guest's own kallsyms.
    :raises KprobeError: not attached, or the guest is no Linux; or *vmlinux* is another kernel, or none.
    """
    link = the_plugin().attachments.need_link()
    guest = link.session.guest
    if not isinstance(guest, LinuxGuest):
        raise KprobeError("only a Linux guest has kallsyms", "use gdb's 'symbol-file'")
    path = link.profile.kernel.vmlinux if vmlinux is None else vmlinux.expanduser()
    if path is None:
        with link.stopped():
            guest.refresh()  # modules may have come since the last look
            return _load_kallsyms(guest)
    found = build_id_of(path)
    if found != guest.build_id:
        raise KprobeError(
            f"{path} is not the guest's kernel: its build id is {found.hex()}, the guest's {guest.build_id.hex()}",
            f"the guest runs {guest.description}",
        )
    gdb.execute(f'symbol-file -o {guest.image.slide:#x} "{path}"', to_string=True)
    return LoadedSymbols(path, guest.image.slide, 0)


def _load_kallsyms(guest: LinuxGuest) -> LoadedSymbols:
    symbols = [symbol for symbol in guest.kallsyms if symbol.type not in "aA" and symbol.addr >= guest.image.base]
    image = AddressRange(guest.image.base, guest.image.end)
    text = list(guest.text_ranges())
    data = [AddressRange(end, image.end) for end in (window.end for window in text) if end in image]
    with tempfile.NamedTemporaryFile(prefix="kallsyms-", suffix=".elf") as file:
        file.write(symbol_file(symbols, text, data))
        file.flush()
        gdb.execute(f'symbol-file -readnow "{file.name}"', to_string=True)
    return LoadedSymbols(None, 0, len(symbols))
