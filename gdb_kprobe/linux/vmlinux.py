"""What a vmlinux file says of a kernel: which one it is, and its types, for a guest that has none in its memory."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gdb_kprobe.errors import KprobeError

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

_SECONDS: Final = 600
"""At most, for pahole; Debian's kernels take it a minute."""


def build_id_of(path: Path) -> bytes:
    """The GNU build id of the vmlinux at *path*.

    :raises KprobeError: no ELF file, or one without a build id.
    """
    from elftools.elf.sections import NoteSection

    with _opened(path) as elf:
        section = elf.get_section_by_name(".notes")
        notes = list(section.iter_notes()) if isinstance(section, NoteSection) else []
    for note in notes:
        if note["n_name"] == "GNU" and note["n_type"] == "NT_GNU_BUILD_ID":
            return bytes.fromhex(note["n_desc"])
    raise KprobeError(f"{path} has no build id", "is it a vmlinux?")


def types_of(path: Path) -> bytes:
    """The types of the vmlinux at *path* as BTF: its own, or made of its debug info (DWARF) by pahole.

    :raises KprobeError: it has neither, or pahole is missing or fails.
    """
    with _opened(path) as elf:
        section = elf.get_section_by_name(".BTF")
        if section is not None:
            return bytes(section.data())
        has_dwarf = elf.get_section_by_name(".debug_info") is not None
    if not has_dwarf:
        raise KprobeError(f"{path} has no types, neither .BTF nor .debug_info", "build it with CONFIG_DEBUG_INFO")
    stat = path.stat()
    return _encoded(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _encoded(path: Path, changed: int, size: int) -> bytes:
    """What pahole makes of the DWARF in the file that was last *changed* then; that takes long, and is kept."""
    del changed, size
    with tempfile.TemporaryDirectory(prefix="gdb-kprobe-types-") as directory:
        out = Path(directory) / "btf"
        command = ["pahole", f"--btf_encode_detached={out}", str(path)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL
            )
        except FileNotFoundError:
            raise KprobeError(
                f"the types of {path} are DWARF, which pahole reads, and pahole is not installed",
                "sudo apt-get install pahole (or dwarves)",
            ) from None
        except subprocess.TimeoutExpired:
            raise KprobeError(f"pahole has not read {path} in {_SECONDS} s", "is it a vmlinux?") from None
        if done.returncode or not out.exists():
            said = (done.stderr or done.stdout).strip()
            raise KprobeError(f"pahole cannot read the types of {path}: {said}", "a pahole as old as the compiler?")
        return out.read_bytes()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ELFFile]:
    """:raises KprobeError: it cannot be read, or is no ELF file."""
    # Imported here, not at the top: it is a tenth of the plugin's loading time.
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        with path.open("rb") as file:
            yield ELFFile(file)
    except OSError as error:
        raise KprobeError(f"cannot read {path}: {error.strerror}") from error
    except ELFError as error:
        raise KprobeError(f"{path} is no ELF file: {error}", "a vmlinux is wanted, not a compressed vmlinuz") from error
