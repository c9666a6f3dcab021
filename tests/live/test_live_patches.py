"""Live patches of the guest's, before and after a probe on the function: they work, and the user is told."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path

import pytest

from kprobe_guest import GuestSpec
from tests.support.live_patch import NAME, NEW, TEXT, make_live_patch
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

FUNCTION = "cmdline_proc_show"
PATCHES = "/sys/kernel/livepatch"


def put_patch(guest: Probed, directory: Path) -> None:
    """Have the module in the guest's /tmp."""
    vm, kernel = guest.guest, guest.snapshot.guest
    another = gzip.decompress(base64.b64decode(vm.check_output("gzip -c $(find /modules -name 'loop.ko') | base64")))
    made = base64.b64encode(gzip.compress(make_live_patch(kernel, another, FUNCTION, directory))).decode()
    vm.check_output("rm -f /tmp/made")
    for at in range(0, len(made), 500):
        vm.check_output(f"echo '{made[at : at + 500]}' >>/tmp/made")
    vm.check_output(f"base64 -d /tmp/made | gzip -d >/tmp/{NAME}.ko")


def load(guest: Probed) -> None:
    guest.guest.check_output(f"insmod /tmp/{NAME}.ko")
    guest.guest.check_output(f"until grep -q 0 {PATCHES}/{NAME}/transition; do sleep 0.2; done", timeout=120)


def unload(guest: Probed) -> None:
    guest.guest.check_output(f"echo 0 >{PATCHES}/{NAME}/enabled")
    guest.guest.check_output(f"until rmmod {NAME} 2>/dev/null; do sleep 0.2; done", timeout=120)


def shown(guest: Probed, times: int = 1) -> set[str]:
    """What *times* calls of the function show."""
    return {guest.guest.check_output("cat /proc/cmdline").strip() for _ in range(times)}


@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_a_live_patch_works_beside_a_probe_and_is_told_of(probed: Boot, kernel: str, tmp_path: Path) -> None:
    guest = probed(GuestSpec(kernel=kernel, extra_cmdline=("patched=1",)))  # of its own: it stays tainted
    put_patch(guest, tmp_path)
    (before,) = shown(guest)
    told = f"calls of {FUNCTION} go to {NEW}"
    with guest.gdb() as gdb:
        guest.add(gdb, f"p:ours {FUNCTION}")
        gdb.cont()
        assert shown(guest, 5) == {before}
        load(guest)
        assert shown(guest, 5) == {TEXT}
        gdb.interrupt()
        assert told in " ".join("".join(gdb.transcript[-40:]).split())
        assert guest.hits(gdb) == {"ours": 5}
        assert "[REDIRECTED]" in gdb.console("kprobe list")
        assert told in " ".join(gdb.console("kprobe info ours").split())
        gdb.console("kprobe delete ours")
        # The other order.
        answer = " ".join(gdb.console(f"kprobe p:later {FUNCTION}").split())
        assert told in answer or told in " ".join("".join(gdb.transcript[-40:]).split())
        gdb.cont()
        assert shown(guest, 3) == {TEXT}
        unload(guest)
        assert shown(guest, 4) == {before}
        gdb.interrupt()
        assert guest.hits(gdb) == {"later": 4}
        assert "[REDIRECTED]" not in gdb.console("kprobe list")
        gdb.console("kprobe detach")
    load(guest)
    assert shown(guest) == {TEXT}
    unload(guest)
    assert shown(guest) == {before}
