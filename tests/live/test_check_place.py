"""``kprobe check`` of one place as a user types it, on a live guest; and the guest's own kprobes."""

from __future__ import annotations

import pytest

from gdb_kprobe.linux.ftrace import NOP
from gdb_kprobe.model import VirtAddr
from gdb_kprobe.testing import GdbCommandError
from gdb_kprobe.x86.decode import iter_insns
from kprobe_guest import GuestSpec
from tests.support.kernel_events import Way, events
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live


def words(text: str) -> str:
    """*text* on one line: the fields are wrapped."""
    return " ".join(text.split())


def version_of(guest: Probed) -> str:
    """As in the names of the kernel's rules: ``6.1``."""
    return ".".join(guest.snapshot.guest.release.split(".")[:2])


def test_one_place_in_full(probed: Boot) -> None:
    guest = probed(GuestSpec())
    nop, pad = (guest.pad(guest.address(name)) for name in ("vfs_read", "exc_int3"))
    version = version_of(guest)
    with guest.gdb() as gdb:
        entry = words(gdb.console(f"kprobe check vfs_read+{nop:#x}"))
        inside = words(gdb.console("kprobe check vfs_read+1"))
        trap = words(gdb.console(f"kprobe check exc_int3+{pad:#x}"))
        init = words(gdb.console("kprobe check start_kernel"))
        gdb.console("kprobe detach")
    number = 2 if nop else 1
    assert f"(vfs_read+{nop:#x}) answer it can be probed, optimized" in entry
    assert f"boundary yes: instruction {number} of the function" in entry
    assert "bytes 0f 1f 44 00 00 instruction nop dword ptr [rax + rax] (nop)" in entry
    assert "optimized yes, in the slot: 0x" in entry
    assert "boosted yes, in the slot: 0x" in entry
    assert "single-step yes, in the slot: 0x" in entry
    assert f"table ftrace record: the nop at vfs_read+{nop:#x}" in entry
    assert f"the kernel can_probe ({version}): yes the kernel can_boost ({version}): yes" in entry
    assert "answer not an instruction boundary: it is inside the instruction at vfs_read+0x0" in inside
    assert f"hint: the nearest instruction that can be probed is vfs_read+{nop:#x}" in inside
    assert "instruction" not in inside.partition("hint:")[2].replace("the nearest instruction", "")
    assert f"answer on the #BP path: exc_int3+{pad:#x}: an int3 there would trap for ever" in trap
    assert "boosted no: on the #BP path single-step no: on the #BP path" in trap
    assert f"the kernel can_probe ({version}): no, on the #BP path" in trap
    assert "answer init text, freed after boot" in init
    assert "rung" not in init


def test_an_exception_table_place_names_its_fixup(probed: Boot) -> None:
    guest = probed(GuestSpec())
    kernel = guest.snapshot.guest
    facts = kernel.text_facts()
    at = next(VirtAddr(at) for at in facts.tables.ex_table if facts.reason_at(VirtAddr(at), 1) is None)
    place, fixup = kernel.place_of(at), facts.fixup_of(at)
    assert place.symbol is not None
    assert fixup is not None
    with guest.gdb() as gdb:
        shown = words(gdb.console(f"kprobe check {place.symbol.name}+{place.offset:#x}"))
        gdb.console("kprobe detach")
    assert "answer it can be probed, single-step" in shown
    assert "boosted no: exception table instruction: a fault must be seen at the original address" in shown
    assert f"exception table: after a fault it goes on at {kernel.place_of(fixup)}" in shown
    assert f"can_boost ({version_of(guest)}): no, it is in the exception table" in shown


@pytest.mark.parametrize("optimized", [False, True], ids=["int3", "jump"])
def test_a_kprobe_of_the_guests_own_is_refused_and_read_through(probed: Boot, optimized: bool) -> None:
    guest = probed(GuestSpec())
    vm = guest.guest
    start = guest.address("vfs_read")
    body = guest.pad(start) + len(NOP)
    with guest.gdb() as gdb:
        before = words(gdb.console(f"kprobe check vfs_read+{body:#x}"))
        length = len(before.partition("bytes ")[2].partition(" instruction")[0].split())
        following = f"vfs_read+{body + length:#x}"
        expected = words(gdb.console(f"kprobe check {following}"))
        addr = VirtAddr(start + body)
        gdb.cont()
        with events(vm, [addr], Way.OPTIMIZED if optimized else Way.INT3):
            gdb.interrupt()
            with pytest.raises(GdbCommandError) as caught:
                gdb.console(f"kprobe p:x vfs_read+{body:#x}")
            own = words(gdb.console(f"kprobe check vfs_read+{body:#x}"))
            after = words(gdb.console(f"kprobe check {following}"))
            gdb.cont()
        gdb.interrupt()
        again = words(gdb.console(f"kprobe check vfs_read+{body:#x}"))
        gdb.console("kprobe detach")
    assert f"a kprobe of the guest's own: the guest has put one at vfs_read+{body:#x}" in words(str(caught.value))
    assert "hint: the nearest instruction that can be probed is vfs_read+0x" in words(str(caught.value))
    assert "answer a kprobe of the guest's own" in own
    assert f"table a kprobe of the guest's own at vfs_read+{body:#x}" in own
    # The bytes are those under the guest's int3.
    assert before.partition("bytes ")[2].partition(" optimized")[0] in own
    assert (
        after.partition("boundary")[2].partition("optimized")[0]
        == (expected.partition("boundary")[2].partition("optimized")[0])
    )
    assert again == before


@pytest.mark.parametrize(
    ("command", "said", "hint"),
    [
        ("kprobe check", "one place, or --all?", "kprobe check vfs_read+5"),
        ("kprobe check vfs_read --all", "one place, or --all?", "kprobe check vfs_read+5"),
        ("kprobe check vfs_read --json x", "--json is for --all", "--all --json FILE"),
        ("kprobe check vfs_raed", "no such symbol: vfs_raed is not in kallsyms", "did you mean vfs_read"),
        ("kprobe check jiffies", "not kernel text: jiffies is data", "name a function"),
        ("kprobe check vfs_read+0x10000", "offset is outside the symbol", "offsets 0 to 0x"),
        ("kprobe check --fast", "unrecognized arguments: --fast", "help kprobe check"),
    ],
)
def test_wrong_arguments(probed: Boot, command: str, said: str, hint: str) -> None:
    with probed(GuestSpec()).gdb() as gdb:
        with pytest.raises(GdbCommandError) as caught:
            gdb.console(command)
        assert "example" in gdb.console("help kprobe check").lower()
        gdb.console("kprobe detach")
    assert said in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("strategy", ["optimized", "boosted", "single-step"])
def test_an_address_in_the_code_of_a_probe_names_what_it_stands_for(probed: Boot, strategy: str) -> None:
    """The oops of a guest that has died in displaced code names the region."""
    guest = probed(GuestSpec())
    with guest.gdb() as gdb:
        guest.add(gdb, "p:one __x64_sys_getpriority", strategy)
        gdb.console("python from gdb_kprobe.gdbext import api")
        told = gdb.console("python print(*(hex(n) for s in api.sites() for n in (s.addr, s.slot.start, s.slot.size)))")
        addr, start, size = (int(word, 16) for word in told.split())
        kernel = guest.snapshot.guest
        code = bytes.fromhex(gdb.console(f"python print(api.read({start}, {size}).hex())").strip())
        insns = iter_insns(guest.snapshot.original(VirtAddr(addr), 32), VirtAddr(addr))
        displaced = [next(insns), next(insns)] if strategy == "optimized" else [next(insns)]
        for insn in displaced:
            at = start + code.index(insn.raw, 8)
            told = gdb.console(f"kprobe check {at:#x}")
            assert f"{at:#x} is in the code of a probe. It stands for {kernel.place_of(insn.addr)} " in told
            assert f"{insn.addr:#x}" in told.splitlines()[1]
        gdb.console("kprobe delete all")
        told = gdb.console(f"kprobe check {start + 8:#x}")
        assert f"stands for {kernel.place_of(VirtAddr(addr))} " in told, "a task may still be there"
        gdb.console("kprobe detach")
