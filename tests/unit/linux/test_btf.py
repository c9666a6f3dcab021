from __future__ import annotations

import struct
from typing import Any

import pytest

from gdb_kprobe.errors import GuestStateError
from gdb_kprobe.linux.btf import Btf
from gdb_kprobe.linux.structs import Struct, for_each_list_entry, for_each_struct, read_struct
from gdb_kprobe.model import VirtAddr

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, CONST = 1, 2, 3, 4, 5, 6, 7, 8, 10
FUNC, FUNC_PROTO, VAR, DATASEC, DECL_TAG, ENUM64 = 12, 13, 14, 15, 17, 19


class Writer:
    """Composes BTF as Documentation/bpf/btf.rst describes it; the first type has id 1."""

    def __init__(self) -> None:
        self.strings = b"\0"
        self.types = b""
        self.count = 0

    def string(self, text: str) -> int:
        if not text:
            return 0
        at = self.strings.find(b"\0" + text.encode() + b"\0")
        if at < 0:
            at = len(self.strings) - 1
            self.strings += text.encode() + b"\0"
        return at + 1

    def add(self, kind: int, name: str, size_or_type: int, *extra: int, vlen: int = 0, flag: bool = False) -> int:
        info = flag << 31 | kind << 24 | vlen
        self.types += struct.pack("<III", self.string(name), info, size_or_type)
        self.types += b"".join(struct.pack("<I", word & 0xFFFF_FFFF) for word in extra)
        self.count += 1
        return self.count

    def struct(
        self, name: str, size: int, *members: tuple[str, int, int], kind: int = STRUCT, flag: bool = False
    ) -> int:
        words = [word for member, type_id, bits in members for word in (self.string(member), type_id, bits)]
        return self.add(kind, name, size, *words, vlen=len(members), flag=flag)

    def blob(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + self.strings


@pytest.fixture
def blob() -> bytes:
    w = Writer()
    u32 = w.add(INT, "unsigned int", 4, 32)
    u64 = w.add(INT, "unsigned long", 8, 64)
    pointer = w.add(PTR, "", 0)
    list_head = w.struct("list_head", 16, ("next", pointer, 0), ("prev", pointer, 64))
    w.struct("entry", 24, ("value", u64, 0), ("list", list_head, 64))
    w.add(FWD, "module", 0)
    w.add(FUNC_PROTO, "", u32, 0, u64, vlen=1)
    w.add(FUNC, "vfs_read", 7)
    w.add(VAR, "jiffies", u64, 1)
    w.add(DATASEC, ".data", 8, 7, 0, 8, vlen=1)
    w.add(DECL_TAG, "tag", 7, 0xFFFF_FFFF)
    layout = w.struct("module_layout", 16, ("base", pointer, 0), ("size", u32, 64))
    alias = w.add(TYPEDEF, "layout_t", layout)
    constant = w.add(CONST, "", alias)
    array = w.add(ARRAY, "", 0, layout, u32, 3)
    inner = w.struct("", 16, ("deep", u64, 64), kind=STRUCT)
    union = w.struct("", 16, ("number", u32, 0), ("", inner, 0), kind=UNION)
    chars = w.add(ARRAY, "", 0, w.add(INT, "char", 1, 8), u32, 8)
    w.struct(
        "module", 128, ("state", u32, 0), ("", union, 64), ("core_layout", constant, 192), ("mem", array, 320),
        ("name", chars, 704), ("list", pointer, 768),
    )  # fmt: skip
    w.struct("bits", 8, ("low", u32, 3 << 24), ("high", u32, 5 << 24 | 32), flag=True)
    names = [w.string(text) for text in ("RUNNING", "HALTED")]
    w.add(ENUM, "system_states", 4, names[0], 3, names[1], -1, vlen=2, flag=True)
    w.add(ENUM, "", 4, w.string("FTRACE_FL_DISABLED"), 1 << 25, vlen=1)
    w.add(ENUM64, "wide", 8, w.string("WIDE"), 1, 2, vlen=1)
    w.add(ENUM, "one_sided", 4, w.string("TOP_BIT"), 1 << 31, vlen=1)
    return w.blob()


@pytest.fixture
def btf(blob: bytes) -> Btf:
    return Btf(blob)


@pytest.mark.parametrize(
    ("path", "offset", "size"),
    [
        ("state", 0, 4),
        ("number", 8, 4),
        ("deep", 16, 8),
        ("core_layout", 24, 16),
        ("core_layout.base", 24, 8),
        ("core_layout.size", 32, 4),
        ("mem", 40, 48),
        ("mem.size", 48, 4),
        ("name", 88, 8),
    ],
)
def test_members_also_of_anonymous_and_typedefed_ones(btf: Btf, path: str, offset: int, size: int) -> None:
    found = btf.member("module", path)
    assert (found.offset, found.size) == (offset, size)
    assert btf.offset_of("module", path) == offset


@pytest.mark.parametrize("path", ["nothing", "state.nothing", "core_layout.nothing", ""])
def test_unknown_member_is_none_or_a_clear_error(btf: Btf, path: str) -> None:
    assert btf.find_member("module", path) is None
    assert not btf.has_member("module", path)
    with pytest.raises(GuestStateError, match=rf"no module\.{path}"):
        btf.offset_of("module", path)


@pytest.mark.parametrize("name", ["nothing", "unsigned int", "vfs_read"])
def test_unknown_type_is_a_clear_error(btf: Btf, name: str) -> None:
    assert btf.find_member(name, "a") is None
    with pytest.raises(GuestStateError, match=f"no type {name}"):
        btf.size_of(name)
    with pytest.raises(GuestStateError, match=f"no enum {name}"):
        btf.enum(name)


def test_a_forward_declaration_is_not_the_type(btf: Btf) -> None:
    assert btf.size_of("module") == 128


def test_bit_fields_do_not_disturb_byte_offsets(btf: Btf) -> None:
    assert btf.offset_of("bits", "high") == 4


def test_enumerators(btf: Btf) -> None:
    assert btf.enum("system_states") == {"RUNNING": 3, "HALTED": -1}
    assert btf.enum("wide") == {"WIDE": 1 | 2 << 32}
    assert btf.enum("one_sided") == {"TOP_BIT": 1 << 31}
    assert btf.enumerator("FTRACE_FL_DISABLED") == 1 << 25
    assert btf.enumerator("state") is None
    assert btf.enumerator("nothing") is None


@pytest.mark.parametrize("cut", [0, 10, 23, 100])
def test_cut_off_btf_is_refused(blob: bytes, cut: int) -> None:
    with pytest.raises(GuestStateError, match=r"BTF\) is damaged.*\n.*CONFIG_DEBUG_INFO_BTF"):
        Btf(blob[:cut])


def test_wrong_magic_is_refused(blob: bytes) -> None:
    with pytest.raises(GuestStateError, match="damaged"):
        Btf(b"\0\0" + blob[2:])


# -- structures in memory -----------------------------------------------------------------------------------------


def test_struct_members_from_memory(btf: Btf, memory: Any) -> None:
    data = bytearray(128)
    data[0:4] = b"\xfe\xff\xff\xff"
    data[24:32] = (0xFFFF_FFFF_C000_0000).to_bytes(8, "little")
    data[88:96] = b"loop\0xyz"
    memory.add(0x1000, bytes(data))
    found = read_struct(memory, btf, "module", VirtAddr(0x1000))
    assert (found.uint("state"), found.sint("state")) == (0xFFFF_FFFE, -2)
    assert found.pointer("core_layout.base") == 0xFFFF_FFFF_C000_0000
    assert found.string("name") == "loop"
    assert found.has("mem")
    assert not found.has("nothing")
    with pytest.raises(GuestStateError, match=r"no module\.nothing"):
        found.uint("nothing")
    assert isinstance(found, Struct)


def list_of(memory: Any, *nodes: int) -> None:
    for node, following in zip(nodes, (*nodes[1:], nodes[0]), strict=True):
        memory.add(node, following.to_bytes(8, "little"))


def test_list_yields_what_is_around_its_nodes(memory: Any) -> None:
    list_of(memory, 0x100, 0x218, 0x318)
    assert list(for_each_list_entry(memory, VirtAddr(0x100), 0x18)) == [0x200, 0x300]


def test_empty_list_yields_nothing(memory: Any) -> None:
    list_of(memory, 0x100)
    assert list(for_each_list_entry(memory, VirtAddr(0x100), 0x18)) == []


def test_list_that_never_comes_back_is_an_error(memory: Any) -> None:
    list_of(memory, 0x200, 0x300)
    memory.add(0x100, (0x200).to_bytes(8, "little"))
    with pytest.raises(GuestStateError, match="list at 0x100 has no end"):
        for _ in for_each_list_entry(memory, VirtAddr(0x100), 0):
            pass


def test_structures_on_a_list_are_copied(btf: Btf, memory: Any) -> None:
    for addr, value, following in ((0x200, 7, 0x308), (0x300, 8, 0x100)):
        memory.add(addr, value.to_bytes(8, "little") + following.to_bytes(8, "little") + bytes(8))
    memory.add(0x100, (0x208).to_bytes(8, "little"))
    found = list(for_each_struct(memory, btf, "entry", "list", VirtAddr(0x100)))
    assert [(entry.addr, entry.uint("value")) for entry in found] == [(0x200, 7), (0x300, 8)]


def test_structures_on_a_list_that_never_comes_back_are_an_error(btf: Btf, memory: Any) -> None:
    memory.add(0x200, bytes(8) + (0x208).to_bytes(8, "little") + bytes(8))
    memory.add(0x100, (0x208).to_bytes(8, "little"))
    with pytest.raises(GuestStateError, match="list at 0x100 has no end"):
        for _ in for_each_struct(memory, btf, "entry", "list", VirtAddr(0x100)):
            pass
