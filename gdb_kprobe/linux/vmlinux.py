"""What a vmlinux file says of a kernel: which one it is, and its types, for a guest that has none in its memory."""

from __future__ import annotations

import contextlib
import functools
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeGuard

from gdb_kprobe.errors import KprobeError

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import Section

_SECONDS: Final = 600
"""At most, for pahole; Debian's kernels take it a minute."""
_LOOK_EVERY: Final = 0.1
"""Seconds between two looks whether a Ctrl-C is held back."""


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
        if _has_data(section):
            return bytes(section.data())
        has_dwarf = _has_data(elf.get_section_by_name(".debug_info"))
    if not has_dwarf:
        raise KprobeError(f"{path} has no types, neither .BTF nor .debug_info", "build it with CONFIG_DEBUG_INFO")
    stat = path.stat()
    return _encoded(path, stat.st_mtime_ns, stat.st_size)


def _has_data(section: Section | None) -> TypeGuard[Section]:
    """Whether *section* is in the file; with the debug info apart, each of the two files has the headers of all."""
    return section is not None and section["sh_type"] != "SHT_NOBITS"


@functools.lru_cache(maxsize=2)
def _encoded(path: Path, changed: int, size: int) -> bytes:
    """What pahole makes of the DWARF in the file that was last *changed* then; that takes long, and is kept."""
    del changed, size
    with tempfile.TemporaryDirectory(prefix="gdb-kprobe-types-") as directory:
        out = Path(directory) / "btf"
        command = ["pahole", f"--btf_encode_detached={out}", str(path)]
        status, said = _run(command, Path(directory) / "said", path)
        if status or not out.exists():
            raise KprobeError(f"pahole cannot read the types of {path}: {said}", "a pahole as old as the compiler?")
        return out.read_bytes()


def _run(command: list[str], log: Path, path: Path) -> tuple[int, str]:
    """Run pahole on *path*; returns its status, and what it says, which is in *log* meanwhile.

    A caller that holds SIGINT back, as a debugger's commands do, ends it by a Ctrl-C all the same.

    :raises KprobeError: it is not installed, takes too long, or was ended.
    """
    deadline = time.monotonic() + _SECONDS
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except OSError as error:
            raise KprobeError(
                f"the types of {path} are DWARF, which pahole reads, and pahole "
                + ("is not installed" if isinstance(error, FileNotFoundError) else f"cannot be run: {error.strerror}"),
                "sudo apt-get install pahole (or dwarves)",
            ) from error
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_EVERY)
                    return process.returncode, log.read_text(errors="replace").strip()
                if signal.SIGINT in signal.sigpending():
                    raise KprobeError(f"pahole was interrupted while it read {path}", "no type was read: attach again")
                if time.monotonic() > deadline:
                    raise KprobeError(f"pahole has not read {path} in {_SECONDS} s", "is it a vmlinux?")
        finally:
            if process.poll() is None:
                process.kill()  # it holds SIGTERM back as we do
                process.wait()


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
