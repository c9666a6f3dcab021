"""What text is ours, and what it was before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.kprobes.patch import MAX_PATCH, CodePatch, TextMap, over, recover
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import iter_insns

BASE = VirtAddr(0xFFFF_FFFF_8100_0000)


def test_the_inverse_undoes_a_patch() -> None:
    patch = CodePatch(BASE, b"\x55", b"\xcc")
    assert patch.inverse == CodePatch(BASE, b"\xcc", b"\x55")
    assert patch.inverse.inverse == patch


@pytest.mark.parametrize("size", range(5, 20))
def test_what_decodes_a_filled_window_comes_out_behind_it(size: int) -> None:
    """As the guest's ``can_probe`` does: from the patch to the instruction behind the window, whatever was in it."""
    text = bytes(range(0x80, 0x80 + size))
    patch = over(BASE, text, b"\xe9\x00\x00\x00\x00")
    assert len(patch.old) <= MAX_PATCH
    now = patch.new + text[len(patch.new) :]
    first, *rest = iter_insns(now + b"\x90", BASE)
    assert (first.length, rest[-1].addr, rest[-1].raw) == (5, BASE + size, b"\x90")
    # Nothing in between may be probed: int3, but for a nop at the end of the longest.
    assert {insn.raw for insn in rest[:-1] if insn.length == 1} <= {b"\xcc"}
    assert patch.inverse.new == text[: len(patch.new)]


def test_an_int3_is_filled_up_to_the_end_of_its_instruction() -> None:
    assert over(BASE, bytes.fromhex("4889e5"), b"\xcc") == CodePatch(BASE, bytes.fromhex("4889e5"), b"\xcc\xcc\xcc")


@pytest.mark.parametrize(("old", "new"), [(b"", b""), (b"\x55", b"\xcc\xcc")])
def test_a_patch_replaces_as_much_as_it_writes(old: bytes, new: bytes) -> None:
    with pytest.raises(AssertionError):
        CodePatch(BASE, old, new)


@given(
    st.binary(min_size=64, max_size=64),
    st.dictionaries(st.integers(0, 9).map(lambda n: 6 * n), st.integers(1, 5), max_size=10),
    st.integers(0, 63),
    st.integers(0, 64),
)
def test_any_window_shows_the_original_bytes(text: bytes, sites: dict[int, int], start: int, size: int) -> None:
    """Also one that begins or ends in the middle of a patch."""
    patched, text_map = bytearray(text), TextMap()
    for at, length in sites.items():
        new = bytes(byte ^ 0xFF for byte in text[at : at + length])
        text_map.add(CodePatch(VirtAddr(BASE + at), text[at : at + length], new))
        patched[at : at + length] = new
    window = bytes(patched[start : start + size])
    assert text_map.original(VirtAddr(BASE + start), window) == text[start : start + size]


def test_text_elsewhere_is_shown_as_it_is() -> None:
    patch = CodePatch(BASE, b"\x55", b"\xcc")
    assert recover(VirtAddr(BASE + 1), b"\xcc\xcc", [patch]) == b"\xcc\xcc"
    assert recover(VirtAddr(BASE - 2), b"\xcc\xcc", [patch]) == b"\xcc\xcc"
    assert recover(VirtAddr(BASE - 1), b"\xcc\xcc", [patch]) == b"\xcc\x55"


def test_patches_come_and_go() -> None:
    one, two = CodePatch(BASE, b"\x55", b"\xcc"), CodePatch(VirtAddr(BASE + 9), b"\x90", b"\xcc")
    text_map = TextMap()
    text_map.add(one)
    text_map.add(two)
    assert (text_map.at(BASE), len(text_map), list(text_map)) == (one, 2, [one, two])
    text_map.remove(one)
    assert (text_map.at(BASE), list(text_map)) == (None, [two])


def test_nothing_is_patched_twice() -> None:
    text_map = TextMap()
    text_map.add(CodePatch(BASE, b"\x55", b"\xcc"))
    with pytest.raises(AssertionError, match="patched twice"):
        text_map.add(CodePatch(BASE, b"\xcc", b"\xcc"))
