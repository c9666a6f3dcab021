"""Hits, plans and lists of probes as they are printed."""

from __future__ import annotations

import pytest

from gdb_kprobe.guest.guest import Place
from gdb_kprobe.kprobes.patch import CodePatch
from gdb_kprobe.kprobes.plan import Plan
from gdb_kprobe.kprobes.slots import Slot
from gdb_kprobe.language.definition import parse_definition
from gdb_kprobe.language.spec import FetchArg, FetchType
from gdb_kprobe.model import CpuId, Reason, Refusal, Rung, Symbol, VirtAddr, offset
from gdb_kprobe.render.hit import folded, hit_line, value
from gdb_kprobe.render.plan import listing, plan
from gdb_kprobe.render.probes import flags, probe_info, probe_list
from gdb_kprobe.render.text import WIDTH
from gdb_kprobe.session.inspect import ProbeInfo
from gdb_kprobe.session.probes import Hit, Probe
from gdb_kprobe.x86.decode import decode
from gdb_kprobe.x86.families import Family, classify

START = VirtAddr(0xFFFF_FFFF_8123_4560)
PLACE = Place(START, START, offset(START, 0x140), Symbol("do_sys_openat2", START, "T"))
_EXT4 = VirtAddr(0xFFFF_FFFF_C000_1230)
MODULE_PLACE = Place(offset(_EXT4, 4), _EXT4, offset(_EXT4, 0x80), Symbol("ext4_sync_fs", _EXT4, "t", "ext4"))
SLOT = VirtAddr(0xFFFF_FFFF_C800_1000)


def probe(definition: str, place: Place | None = None, *, enabled: bool = True, gone: bool = False) -> Probe:
    return Probe(parse_definition(definition), place=place, enabled=enabled, gone=gone)


@pytest.mark.parametrize(
    ("raw", "type_", "expected"),
    [
        (0xFFFF_FF9C, FetchType.X64, "0xffffff9c"),
        (0xFFFF_FF9C, FetchType.S32, "-100"),
        (0xFFFF_FF9C, FetchType.U32, "4294967196"),
        (0xFFFF_FF9C, FetchType.X8, "0x9c"),
        (0xFFFF_FF9C, FetchType.U8, "156"),
        (-100, FetchType.S32, "-100"),
        (0, FetchType.X64, "0x0"),
        (2**64 - 1, FetchType.X64, "0xffffffffffffffff"),
    ],
)
def test_values_are_printed_as_the_kernel_prints_them(raw: int, type_: FetchType, expected: str) -> None:
    assert value(raw, type_) == expected


def test_a_hit_is_a_line_of_the_kernels_trace() -> None:
    args = ((FetchArg("dfd", "di"), 0xFFFF_FF9C), (FetchArg("n", "si", FetchType.S32), 3))
    assert (
        hit_line(Hit(probe("p:open f", PLACE), CpuId(2), args), 12.3456789)
        == "[001]    12.345679: open: (do_sys_openat2+0x0/0x140) dfd=0xffffff9c n=3"
    )


def test_a_hit_without_symbol_or_arguments() -> None:
    at = VirtAddr(0x40_1000)
    hit = Hit(probe("p 0x401000", Place(at, at, at, None)), CpuId(1), ())
    assert hit_line(hit, 0.5) == "[000]     0.500000: p_0x401000: (0x401000)"


def test_a_hit_in_a_module() -> None:
    hit = Hit(probe("p:sync f", MODULE_PLACE), CpuId(13), ())
    assert hit_line(hit, 1) == "[012]     1.000000: sync: (ext4_sync_fs+0x4/0x80 [ext4])"


def test_a_listing_has_its_columns_aligned() -> None:
    assert listing(bytes.fromhex("55 e95f355bb9"), SLOT) == (
        "0xffffffffc8001000:  55              push rbp\n0xffffffffc8001001:  e9 5f 35 5b b9  jmp 0xffffffff815b4565"
    )
    assert listing(b"", SLOT) == ""


def test_what_cannot_be_decoded_is_listed_as_data() -> None:
    assert listing(b"\x06\x07", SLOT) == "0xffffffffc8001000:  06 07  (data)"


def test_a_plan() -> None:
    insn = decode(b"\x55", START)
    family = classify(insn)
    assert isinstance(family, Family)
    made = Plan(
        insn=insn,
        family=family,
        rung=Rung.SINGLE_STEP,
        slot=Slot(offset(SLOT, -8), 16),
        code=b"\x55",
        patch=CodePatch(START, b"\x55", b"\xcc"),
        declined=(
            (Rung.OPTIMIZED, Refusal(Reason.POLICY, START)),
            (
                Rung.BOOSTED,
                Refusal(
                    Reason.NEEDS_SINGLE_STEP,
                    START,
                    "it runs after the instruction, before anything else there",
                    "give no post-handler",
                ),
            ),
        ),
    )
    assert (
        plan(probe("p:open f"), PLACE, made)
        == """\
probe        open
at           0xffffffff81234560 (do_sys_openat2+0x0)
instruction  push rbp (plain)
bytes        55  ->  cc
rung         single-step
slot         0xffffffffc8001000
  0xffffffffc8001000:  55  push rbp
not optimized   not allowed by the profile's policy
not boosted     a post-handler needs the single step: it runs after the
                instruction, before anything else there
                hint: give no post-handler"""
    )


def test_the_list_has_the_kernels_columns_first() -> None:
    probes = [
        ProbeInfo(probe("p:open f", PLACE), 2000, 0, Rung.BOOSTED),
        ProbeInfo(probe("p:sync f", MODULE_PLACE, enabled=False), 12, 3, Rung.SINGLE_STEP),
        ProbeInfo(probe("p:gone f", MODULE_PLACE, gone=True), 0, 0),
        ProbeInfo(probe("p:later f"), 0, 0),
    ]
    assert (
        probe_list(probes)
        == """\
address              symbol              module  flags       hits  missed  rung         name
ffffffff81234560  k  do_sys_openat2+0x0                      2000       0  boosted      open
ffffffffc0001234  k  ext4_sync_fs+0x4    [ext4]  [DISABLED]    12       3  single-step  sync
ffffffffc0001234  k  ext4_sync_fs+0x4    [ext4]  [GONE]         0       0               gone
-                 k  f                           [PENDING]      0       0               later"""
    )


def test_columns_that_would_be_empty_are_left_out() -> None:
    rendered = probe_list([ProbeInfo(probe("p:open f", PLACE), 2000, 0, Rung.BOOSTED)])
    assert rendered == (
        "address              symbol              hits  missed  rung     name\n"
        "ffffffff81234560  k  do_sys_openat2+0x0  2000       0  boosted  open"
    )
    assert max(map(len, rendered.splitlines())) <= WIDTH
    assert probe_list([]) == "no probes"


def test_flags_may_come_together() -> None:
    assert flags(ProbeInfo(probe("p f", enabled=False), 0, 0)) == "[DISABLED][PENDING]"
    assert flags(ProbeInfo(probe("p f", PLACE), 0, 0)) == ""


def test_one_probe_in_full() -> None:
    info = ProbeInfo(probe("p:open do_sys_openat2 dfd=%di", PLACE), 2000, 1, Rung.BOOSTED)
    assert (
        probe_info(info)
        == """\
probe        open
definition   p:kprobes/open do_sys_openat2 dfd=%di
at           0xffffffff81234560 (do_sys_openat2+0x0)
state        enabled
hits         2000
missed       1"""
    )
    assert (
        probe_info(ProbeInfo(probe("p:x veth:veth_xmit"), 0, 0))
        == """\
probe        x
definition   p:kprobes/x veth:veth_xmit
at           veth:veth_xmit, not found yet
state        [PENDING]
hits         0
missed       0"""
    )


def test_a_long_line_of_a_trace_breaks_between_its_arguments() -> None:
    line = "[000]     0.037631: open: (do_sys_openat2+0x0/0x170) dfd=-100 how=0xff75cb05c03a3c60 mode=0x1b6"
    assert folded(line, None) == line
    assert folded(line, len(line)) == line
    assert folded(line, 79) == (
        "[000]     0.037631: open: (do_sys_openat2+0x0/0x170) dfd=-100\n      how=0xff75cb05c03a3c60 mode=0x1b6"
    )


def test_a_probe_without_a_place_is_listed_with_what_was_asked_for() -> None:
    text = probe_list([ProbeInfo(probe("p:x veth:veth_xmit"), 0, 0)])
    assert text.splitlines()[1].split() == ["-", "k", "veth:veth_xmit", "[PENDING]", "0", "0", "x"]
