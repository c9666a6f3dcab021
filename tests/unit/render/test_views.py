"""Hits, plans and lists of probes as they are printed."""

from __future__ import annotations

import pytest

from gdb_kprobe.language.spec import FetchType
from gdb_kprobe.model import Rung, VirtAddr
from gdb_kprobe.render.hit import folded, hit_line, value
from gdb_kprobe.render.plan import listing, plan
from gdb_kprobe.render.probes import flags, probe_info, probe_list
from gdb_kprobe.render.text import WIDTH
from gdb_kprobe.render.views import ArgView, DeclinedView, HitView, InsnView, PlaceView, PlanView, ProbeView

PLACE = PlaceView(VirtAddr(0xFFFF_FFFF_8123_4560), "do_sys_openat2", 0, 0x140)
MODULE_PLACE = PlaceView(VirtAddr(0xFFFF_FFFF_C000_1234), "ext4_sync_fs", 4, 0x80, "ext4")
SLOT = VirtAddr(0xFFFF_FFFF_C800_1000)


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
    hit = HitView("open", PLACE, 1, (ArgView("dfd", 0xFFFF_FF9C), ArgView("n", 3, FetchType.S32)), 12.3456789)
    assert hit_line(hit) == "[001]    12.345679: open: (do_sys_openat2+0x0/0x140) dfd=0xffffff9c n=3"


def test_a_hit_without_time_symbol_or_arguments() -> None:
    assert hit_line(HitView("p_0x401000", PlaceView(VirtAddr(0x40_1000)), 0)) == "[000] p_0x401000: (0x401000)"


def test_a_hit_in_a_module() -> None:
    assert hit_line(HitView("sync", MODULE_PLACE, 12)) == "[012] sync: (ext4_sync_fs+0x4/0x80 [ext4])"


def test_a_listing_has_its_columns_aligned() -> None:
    insns = (
        InsnView(SLOT, b"\x55", "push rbp"),
        InsnView(VirtAddr(SLOT + 1), bytes.fromhex("e95f355b b9"), "jmp 0xffffffff81234561", "back"),
    )
    assert listing(insns) == (
        "0xffffffffc8001000:  55              push rbp\n"
        "0xffffffffc8001001:  e9 5f 35 5b b9  jmp 0xffffffff81234561  ; back"
    )
    assert listing(()) == ""


def test_a_plan() -> None:
    view = PlanView(
        name="open",
        place=PLACE,
        insn="push rbp",
        old=b"\x55",
        new=b"\xcc",
        rung=Rung.SINGLE_STEP,
        slot=SLOT,
        listing=(InsnView(SLOT, b"\x55", "push rbp", "the original"),),
        declined=(
            DeclinedView(Rung.OPTIMIZED, "not implemented yet"),
            DeclinedView(
                Rung.BOOSTED,
                "a post-handler needs the single step: it runs after the instruction, before anything else there",
                "give no post-handler",
            ),
        ),
    )
    assert (
        plan(view)
        == """\
probe        open
at           0xffffffff81234560 (do_sys_openat2+0x0)
instruction  push rbp
bytes        55  ->  cc
rung         single-step
slot         0xffffffffc8001000
  0xffffffffc8001000:  55  push rbp  ; the original
not optimized   not implemented yet
not boosted     a post-handler needs the single step: it runs after the
                instruction, before anything else there
                hint: give no post-handler"""
    )


def test_the_list_has_the_kernels_columns_first() -> None:
    probes = [
        ProbeView("open", PLACE, Rung.BOOSTED, 2000),
        ProbeView("sync", MODULE_PLACE, Rung.SINGLE_STEP, 12, 3, is_enabled=False),
        ProbeView("gone", MODULE_PLACE, None, is_gone=True),
        ProbeView("later", None),
    ]
    assert (
        probe_list(probes)
        == """\
address              symbol              module  flags       hits  missed  rung         name
ffffffff81234560  k  do_sys_openat2+0x0                      2000       0  boosted      open
ffffffffc0001234  k  ext4_sync_fs+0x4    [ext4]  [DISABLED]    12       3  single-step  sync
ffffffffc0001234  k  ext4_sync_fs+0x4    [ext4]  [GONE]         0       0               gone
-                 k                              [PENDING]      0       0               later"""
    )


def test_columns_that_would_be_empty_are_left_out() -> None:
    rendered = probe_list([ProbeView("open", PLACE, Rung.BOOSTED, 2000)])
    assert rendered == (
        "address              symbol              hits  missed  rung     name\n"
        "ffffffff81234560  k  do_sys_openat2+0x0  2000       0  boosted  open"
    )
    assert max(map(len, rendered.splitlines())) <= WIDTH
    assert probe_list([]) == "no probes"


def test_flags_may_come_together() -> None:
    assert flags(ProbeView("x", None, is_enabled=False)) == "[DISABLED][PENDING]"
    assert flags(ProbeView("x", PLACE)) == ""


def test_one_probe_in_full() -> None:
    view = ProbeView("open", PLACE, Rung.BOOSTED, 2000, 1, definition="p:kprobes/open do_sys_openat2 dfd=%di")
    assert (
        probe_info(view)
        == """\
probe        open
definition   p:kprobes/open do_sys_openat2 dfd=%di
at           0xffffffff81234560 (do_sys_openat2+0x0)
state        enabled
hits         2000
missed       1"""
    )
    assert (
        probe_info(ProbeView("x", None, where="veth:veth_xmit"))
        == """\
probe        x
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
    text = probe_list([ProbeView("x", None, where="veth:veth_xmit")])
    assert text.splitlines()[1].split() == ["-", "k", "veth:veth_xmit", "[PENDING]", "0", "0", "x"]
