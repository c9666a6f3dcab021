"""The bare-metal guest: assembled from data/bare.S by pwntools, with a list of its symbols beside it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kprobe_guest.build.cache import build_lock, cache_directory, progress, write_atomically
from kprobe_guest.errors import BuildError

SOURCE = Path(__file__).resolve().parent.parent / "data" / "bare.S"

BASE = 0xFFFF_FFFF_8000_0000
"""Virtual minus physical address; as in the source."""

LOAD_ADDRESS = 0x10_0000


@dataclass(frozen=True, slots=True)
class BareImage:
    """The image for ``-kernel``, and what is where in it (virtual addresses)."""

    path: Path
    symbols: dict[str, int]

    @property
    def symbols_path(self) -> Path:
        """The same symbols as JSON: ``{"symbols": {NAME: ADDRESS}, "region": {"address": A, "size": S}}``."""
        return self.path.with_suffix(".json")

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the functions that the loop calls, each with a counter ``count_NAME``."""
        return tuple(name.removeprefix("count_") for name in self.symbols if name.startswith("count_"))

    def physical(self, name: str) -> int:
        """Physical address of a symbol."""
        return self.symbols[name] - BASE


def build_bare_image() -> BareImage:
    """Assemble the image (or find it).

    :raises BuildError: pwntools cannot assemble: a program that it needs is missing.
    """
    digest = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    path = cache_directory() / "bare" / f"{digest}.bin"
    image = path.with_suffix(".json")
    if not image.exists():
        with build_lock():
            progress("assembling the bare-metal guest")
            code, symbols = _assemble(SOURCE.read_text())
            write_atomically(path, code)
            region = {"address": symbols.pop("region"), "size": symbols.pop("region_size")}
            text = {"address": symbols["image"], "size": symbols["end_of_text"] - symbols["image"]}
            described = {"symbols": symbols, "text": text, "region": region}
            write_atomically(image, json.dumps(described, indent=1).encode())
    return BareImage(path, json.loads(image.read_text())["symbols"])


def _assemble(source: str) -> tuple[bytes, dict[str, int]]:
    # pwntools takes over the terminal when it is imported, unless told not to.
    os.environ.setdefault("PWNLIB_NOTERM", "1")
    from pwnlib.asm import make_elf_from_assembly
    from pwnlib.context import context
    from pwnlib.elf import ELF
    from pwnlib.exception import PwnlibException

    try:
        with tempfile.TemporaryDirectory(prefix="gdb-kprobe-as-") as cache:
            context.cache_dir = cache  # it would make a directory of its own in the user's cache
            path = make_elf_from_assembly(
                source, vma=BASE + LOAD_ADDRESS, extract=False, arch="amd64", log_level="critical"
            )
    except (PwnlibException, OSError) as error:
        raise BuildError(
            f"pwntools cannot assemble {SOURCE.name}: {error}\nrun: sudo apt-get install binutils cpp"
        ) from error
    elf = ELF(path, checksec=False)
    section = elf.get_section_by_name(".shellcode")
    # The source's constants (.set) are symbols too; only names that mean something outside are kept.
    symbols = {
        name: int(address)
        for name, address in sorted(elf.symbols.items(), key=lambda item: (item[1], item[0]))
        if address >= BASE + LOAD_ADDRESS or name == "region_size"
    }
    return section.data(), symbols
