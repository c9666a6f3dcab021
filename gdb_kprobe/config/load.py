"""A profile's file to a :class:`Profile`, every mistake a :class:`ConfigError`; and a profile's name to its file.

::

    gdbstub: localhost:1234          # or the path of a unix socket; required
    qmp: PATH                        # QEMU's QMP socket
    kernel:
      kind: linux                    # or bare
      symbols: PATH                  # bare: a file of NAME: ADDRESS lines
      vmlinux: PATH                  # ELF with debug info, of exactly this kernel; its types, if it has no BTF
    region:                          # required
      source: reserved               # or ivshmem, borrowed, premapped; required
      physical: 0x10000000           # reserved only, and required there
      virtual: auto                  # or an address; required for premapped
      size: 16M
    policy:
      rungs: [optimized, boosted, single-step]
      boost: relocate                # or kernel: only what the guest's own kernel would boost, to compare
    shared_memory: auto              # or off, or the file that backs the guest's RAM

Relative paths start at the profile's directory.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gdb_kprobe.config.document import Section, Value, read_document
from gdb_kprobe.config.placement import check_physical, check_size, check_virtual
from gdb_kprobe.config.profile import (
    ALL_RUNGS,
    DEFAULT_REGION_SIZE,
    KernelConfig,
    KernelKind,
    PolicyConfig,
    Profile,
    RegionConfig,
    RegionSource,
    SharedMemory,
)
from gdb_kprobe.config.scalars import as_choice, as_endpoint, as_file, as_path
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import Boost, Entry, Rung

_PROFILE_KEYS = ("gdbstub", "qmp", "kernel", "region", "policy", "shared_memory")
_POLICY_KEYS = ("rungs", "boost", "entry")
_KERNEL_KEYS = ("kind", "symbols", "vmlinux")
_REGION_KEYS = ("source", "physical", "virtual", "size")
_SUFFIXES = (".yaml", ".yml")


def load_profile(path: Path | str, environment: Mapping[str, str] | None = None) -> Profile:
    """Read and check the profile in the file *path*.

    :param environment: what ``${NAME}`` stands for; the process's own environment when not given.
    :raises ConfigError: the first mistake, with its line.
    """
    path = Path(path)
    document = read_document(path, _PROFILE_KEYS, os.environ if environment is None else environment)
    gdbstub = as_endpoint(document.require("gdbstub", "write gdbstub: localhost:1234, or the path of the socket"))
    kernel = _kernel(document.section("kernel", _KERNEL_KEYS))
    region = document.section("region", _REGION_KEYS)
    if region is None:
        raise document.error("key 'region' is missing", "say where our memory comes from: region: {source: ivshmem}")
    qmp = document.value("qmp")
    return Profile(
        name=path.stem,
        path=path,
        gdbstub=gdbstub,
        kernel=kernel,
        region=_region(region, kernel.kind),
        policy=_policy(document.section("policy", _POLICY_KEYS)),
        shared_memory=_shared_memory(document.value("shared_memory")),
        qmp=None if qmp is None else as_path(qmp),
    )


def find_profile(name_or_path: str, search: Sequence[Path]) -> Path:
    """Return the file of a profile: the path given, or ``NAME.yaml`` in the first directory of *search* that has it.

    :raises KprobeError: there is no such file; names the profiles there are.
    """
    if "/" in name_or_path or name_or_path.endswith(_SUFFIXES):
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return path
        raise KprobeError(f"there is no profile {path}", _known(name_or_path, search))
    for directory in search:
        for suffix in _SUFFIXES:
            if (path := directory / f"{name_or_path}{suffix}").is_file():
                return path
    raise KprobeError(f"there is no profile named {name_or_path!r}", _known(name_or_path, search))


def profile_names(search: Sequence[Path]) -> list[str]:
    """Return the names that :func:`find_profile` finds, sorted."""
    found = {path.stem for directory in search if directory.is_dir() for path in directory.iterdir()
             if path.suffix in _SUFFIXES}  # fmt: skip
    return sorted(found)


def _known(name_or_path: str, search: Sequence[Path]) -> str:
    names = profile_names(search)
    if not names:
        return f"no profiles in {', '.join(map(str, search)) or 'any directory'}; give the path of one"
    near = difflib.get_close_matches(Path(name_or_path).stem, names, n=1)
    question = f"did you mean {near[0]}? " if near else ""
    return f"{question}profiles: {', '.join(names)}"


def _kernel(section: Section | None) -> KernelConfig:
    if section is None:
        return KernelConfig()
    kind_value = section.value("kind")
    kind = KernelKind.LINUX if kind_value is None else as_choice(kind_value, KernelKind)
    symbols, vmlinux = section.value("symbols"), section.value("vmlinux")
    if symbols is not None and kind is KernelKind.LINUX:
        hint = "leave it out; for debug info there is 'vmlinux'"
        raise symbols.error("'kernel.symbols' is for bare-metal guests: Linux's are read from the guest", hint)
    if vmlinux is not None and kind is KernelKind.BARE:
        raise vmlinux.error("'kernel.vmlinux' is for Linux guests", "load a bare-metal program with gdb's 'file'")
    return KernelConfig(
        kind,
        symbols=None if symbols is None else as_file(symbols),
        vmlinux=None if vmlinux is None else as_file(vmlinux),
    )


def _region(section: Section, kind: KernelKind) -> RegionConfig:
    source_value = section.require("source", f"choose from {', '.join(RegionSource)}")
    source = as_choice(source_value, RegionSource)
    if kind is KernelKind.BARE and source is not RegionSource.PREMAPPED:
        raise source_value.error(
            f"source '{source}' is for Linux guests: it is mapped into Linux's page tables",
            "a bare-metal guest maps the memory itself: source: premapped, virtual: 0xADDRESS",
        )
    size_value = section.value("size")
    size = DEFAULT_REGION_SIZE if size_value is None else check_size(size_value, kind)
    physical = section.value("physical")
    if source is RegionSource.RESERVED:
        physical = section.require("physical", "the ADDRESS of the guest's memmap=SIZE$ADDRESS")
    elif physical is not None:
        where = {
            RegionSource.IVSHMEM: "the device's BAR says it",
            RegionSource.BORROWED: "the guest's allocator says it",
            RegionSource.PREMAPPED: "the guest's page tables say it",
        }
        raise physical.error(f"'region.physical' is not for source '{source}'", f"leave it out: {where[source]}")
    virtual = section.value("virtual")
    if source is RegionSource.PREMAPPED:
        virtual = section.require("virtual", "the address at which the guest has mapped the region")
    return RegionConfig(
        source,
        physical=None if physical is None else check_physical(physical, size),
        virtual=None if virtual is None else check_virtual(virtual, size, kind, source),
        size=size,
    )


def _policy(section: Section | None) -> PolicyConfig:
    if section is None:
        return PolicyConfig()
    boost_value = section.value("boost")
    boost = Boost.RELOCATE if boost_value is None else as_choice(boost_value, Boost)
    entry_value = section.value("entry")
    entry = Entry.BEHIND if entry_value is None else as_choice(entry_value, Entry)
    values = section.values("rungs")
    if values is None:
        return PolicyConfig(boost=boost, entry=entry)
    rungs: list[Rung] = []
    for value in values:
        rung = as_choice(value, Rung)
        if rung in rungs:
            raise value.error(f"rung '{rung}' is there twice", "remove one")
        rungs.append(rung)
    if not rungs:
        raise section.error("'policy.rungs' is empty: no probe could be placed", f"choose from {', '.join(ALL_RUNGS)}")
    return PolicyConfig(tuple(rung for rung in ALL_RUNGS if rung in rungs), boost, entry)


def _shared_memory(value: Value | None) -> SharedMemory | Path:
    if value is None:
        return SharedMemory.AUTO
    if value.text in set(SharedMemory):
        return SharedMemory(value.text)
    if "/" not in value.text:
        raise value.error(f"'shared_memory' cannot be {value.text!r}", "write auto, off, or a path with a '/'")
    return as_path(value)
