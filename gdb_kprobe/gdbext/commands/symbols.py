"""``kprobe symbols``."""

from __future__ import annotations

from pathlib import Path

import gdb
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext import plugin
from gdb_kprobe.gdbext.commands.base import Command, write
from gdb_kprobe.session.linux_guest import LinuxGuest


class Symbols(Command):
    """Load a vmlinux with debug info, moved by the guest's KASLR slide.

    kprobe symbols [VMLINUX]

    Without an argument, the file that the profile names. It must be the guest's kernel: the build ids are compared.
    Nothing else needs it.

    Example:
      kprobe symbols /usr/lib/debug/boot/vmlinux-6.1.0-9-amd64"""

    def __init__(self, name: str) -> None:
        super().__init__(name, gdb.COMPLETE_FILENAME)

    def run(self, argument: str) -> None:
        link = plugin.the_plugin().need_link()
        guest = link.attached.guest if link.attached is not None else None
        if not isinstance(guest, LinuxGuest):
            raise KprobeError("only a Linux guest has a vmlinux", "use gdb's 'symbol-file'")
        path = Path(argument).expanduser() if argument else link.profile.kernel.vmlinux
        if path is None:
            raise KprobeError("which file? the profile names no vmlinux", "kprobe symbols VMLINUX")
        found = _build_id(path)
        if found != guest.build_id:
            raise KprobeError(
                f"{path} is not the guest's kernel: its build id is {found.hex()}, the guest's {guest.build_id.hex()}",
                f"the guest runs {guest.description}",
            )
        gdb.execute(f'symbol-file -o {guest.image.slide:#x} "{path}"')
        write(f"Loaded {path} with offset {guest.image.slide:#x}.")


def _build_id(path: Path) -> bytes:
    """:raises KprobeError: no ELF file, or one without a build id."""
    try:
        with path.open("rb") as file:
            section = ELFFile(file).get_section_by_name(".notes")
            notes = list(section.iter_notes()) if isinstance(section, NoteSection) else []
    except OSError as error:
        raise KprobeError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:
        raise KprobeError(f"{path} is no ELF file: {error}", "a vmlinux is wanted, not a compressed vmlinuz") from error
    for note in notes:
        if note["n_type"] == "NT_GNU_BUILD_ID":
            return bytes.fromhex(note["n_desc"])
    raise KprobeError(f"{path} has no build id", "is it a vmlinux?")


def register() -> None:
    Symbols("symbols")
