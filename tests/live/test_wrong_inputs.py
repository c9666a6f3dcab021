"""What a newcomer types wrongly on a live guest: each answer says what, where, why and what to do; nothing is armed."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from gdb_kprobe.model import Reason, VirtAddr
from gdb_kprobe.testing import GdbCommandError
from kprobe_guest import GuestSpec
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

JUMP_LABEL = "a jump label site"

WRONG: tuple[tuple[str, str, str], ...] = (
    ("kprobe p:x vfs_raed", "no such symbol: vfs_raed is not in kallsyms", "did you mean vfs_read"),
    ("kprobe p:x vfs_read+0x10000", "offset is outside the symbol: vfs_read is", "offsets 0 to 0x"),
    (
        "kprobe p:x vfs_read+1",
        "not an instruction boundary: it is inside the instruction at",
        "the nearest instruction that can be probed is vfs_read+{pad:#x}",
    ),
    ("kprobe p:x exc_int3", "on the #BP path", "no instruction of exc_int3 can be probed: choose another function"),
    ("kprobe p:x exc_page_fault", "noinstr text", "choose another function"),
    (f"kprobe p:x {JUMP_LABEL}", "jump label site", "the nearest instruction that can be probed is "),
    ("kprobe p:x vfs_read fd=%rdi", "Invalid register name", "did you mean %di?"),
    ("kprobe p:taken vfs_write", "there is a probe named taken already", "give another name"),
    ("kprobe attach debain", "there is no profile named 'debain'", "did you mean debian?"),
    ("kprobe p:x jiffies", "not kernel text: jiffies is data", "name a function"),
    ("kprobe p:x 0x401000", "0x401000 is an address of user space", "an instruction of the kernel"),
    ("kprobe p:x start_kernel", "init text, freed after boot", "choose a function that stays"),
    ("kprobe p:x veth:vfs_read", "veth has no vfs_read; it is in the core kernel", "write vfs_read"),
    ("kprobe p:x vfs_read name=+0(%si):ustring", "not implemented yet: fetching from memory", "%di:s32"),
    ("kprobe p:x vfs_read if di = 3", "di = 3", "=="),
    ("kprobe p:x VFS_READ", "no such symbol: VFS_READ is not in kallsyms", "did you mean vfs_read?"),
    (
        "kprobe p:x openat2",
        "no such symbol: openat2 is not in kallsyms",
        "did you mean io_openat2, do_sys_openat2",
    ),
    ("kprobe delete tkaen", "there is no probe named tkaen", "taken"),
)


def test_every_mistake_is_told_and_nothing_is_armed(probed: Boot) -> None:
    guest = probed(GuestSpec())
    answers: list[str] = []
    with guest.gdb() as gdb:
        guest.add(gdb, "p:taken vfs_read")
        for command, said, hint in WRONG:
            typed = command.replace(JUMP_LABEL, jump_label_site(guest))
            with pytest.raises(GdbCommandError) as caught:
                gdb.console(typed)
            text = str(caught.value)
            answers.append(f"(gdb) {typed}\n{text}\n")
            assert "Error occurred in Python" not in text
            assert said in text, text
            assert hint.format(pad=guest.pad(guest.address("vfs_read"))) in text, text
            assert "\n  hint: " in text, text
        assert [probe["name"] for probe in gdb.command("-kprobe-list")["probes"]] == ["taken"]
        gdb.console("kprobe detach")
    if "GDB_KPROBE_EVIDENCE" in os.environ:
        (Path(os.environ["GDB_KPROBE_EVIDENCE"]) / "wrong_inputs.txt").write_text("\n".join(answers))


def test_what_is_said_of_a_probe_that_is_added(probed: Boot) -> None:
    guest = probed(GuestSpec())
    names = Counter(symbol.name for symbol in guest.snapshot.guest.kallsyms if symbol.is_text)
    clones = sorted(name for name in names if name.endswith(".isra.0"))
    base = next(name for name in clones if names[name] == 1 and names[name[:-7]] == 1)[:-7]
    with guest.gdb() as gdb:
        waiting = gdb.console("kprobe p:w nosuchmod:foo")
        assert waiting == "w: no module nosuchmod is loaded; it is armed when one of that name comes.\n"
        meant = "(veth is loaded: did you mean that?)"
        near = gdb.console("kprobe p:n veht:foo")
        assert near == f"n: no module veht is loaded {meant}; it is armed when one of that name comes.\n"
        listed = gdb.console("kprobe list").splitlines()
        assert [line.split()[:4] for line in listed[1:]] == [
            ["-", "k", "nosuchmod:foo", "[PENDING]"],
            ["-", "k", "veht:foo", "[PENDING]"],
        ]
        assert f"which are not probed by it: {base}.isra.0" in gdb.console(f"kprobe p:c {base}")
        info = gdb.console("kprobe info c")
        assert info.count("\nat  ") == 1
        assert info.count("probe  ") == 1
        gdb.console("kprobe delete all")
        assert gdb.console("kprobe detach").startswith("0 site(s) restored; the region is unmapped.")


def jump_label_site(guest: Probed) -> str:
    """A place in a function of the core kernel that the guest patches itself."""
    kernel = guest.snapshot.guest
    for name in kernel.match("sched_"):
        for symbol in kernel.kallsyms.lookup(name):
            for offset in range(min(kernel.kallsyms.end(symbol) - symbol.addr, 512)):
                place = kernel.place_of(VirtAddr(symbol.addr + offset))
                refusal = kernel.refusal_at(place, 1)
                if symbol.is_text and refusal is not None and refusal.reason is Reason.JUMP_LABEL:
                    return f"{name}+{offset:#x}"
    raise AssertionError("no function has a jump label")
