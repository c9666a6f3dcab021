"""QEMU ends under a session: gdb says so, and keeps the definitions for the next guest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kprobe_guest import GuestSpec, GuestVm

pytestmark = pytest.mark.live


def test_the_definitions_wait_for_the_next_guest(make_probed: Callable[[GuestVm], Any]) -> None:
    with GuestVm(GuestSpec()) as first:
        guest = make_probed(first)
        with guest.gdb() as gdb:
            guest.add(gdb, "p:one do_sys_openat2")
            gdb.cont()
            first.kill()
            gdb.console("kprobe list")  # what gdb says of the lost connection comes before the answer
            said = "\n".join(gdb.transcript)
            assert "kprobe: QEMU has ended, and the guest with it: there is nothing to restore." in said
            assert (
                "kprobe: the definitions of 1 probe(s) are kept: 'kprobe attach' arms them in the next guest." in said
            )
            assert "still armed" not in said
            with GuestVm(GuestSpec(), first.directory) as second:
                assert "one: do_sys_openat2+0x0 armed." in gdb.console("kprobe attach debian")
                gdb.cont()
                second.run("true")
                gdb.interrupt()
                assert guest.hits(gdb)["one"] > 0
                gdb.console("kprobe detach")
