"""A guest that is not the one any more, or a part of it: nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gdb_kprobe.errors import GuestResetError, KprobeError
from gdb_kprobe.model import ModuleLoad, VirtAddr
from gdb_kprobe.session.probes import Hit, State
from tests.support.toy import Toy

FIRMWARE_CR0 = 0x6000_0010


def reset(toy: Toy) -> None:
    toy.machine.cr0 = FIRMWARE_CR0


def other_kernel(toy: Toy) -> None:
    toy.machine.symbols["idt"] += 16  # every gate is another one's now


ACTS: tuple[Callable[[Any, Any], object], ...] = (
    lambda toy, probe: toy.add("f_nop"),
    lambda toy, probe: toy.session.set_enabled(probe, False),
    lambda toy, probe: toy.session.delete(probe),
    lambda toy, probe: toy.session.settle(),
    lambda toy, probe: toy.session.detach(),
)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("change", [reset, other_kernel])
def test_after_a_reset_every_act_is_an_error_that_writes_nothing(
    toy: Toy, change: Callable[[Any], None], act: Callable[[Any, Any], object]
) -> None:
    probe = toy.add("f_push")
    toy.machine.log.clear()
    change(toy)
    with pytest.raises(GuestResetError, match="was reset"):
        act(toy, probe)
    assert toy.machine.log == []


def test_a_probe_of_an_unloaded_module_is_gone_and_its_text_never_written(toy: Toy) -> None:
    toy.guest.owner = ModuleLoad("mod", VirtAddr(1), 1)
    probe = toy.add("f_push")
    assert toy.session.state_of(probe) is State.ARMED
    toy.guest.owner = None
    toy.machine.log.clear()
    toy.session.settle()
    assert toy.session.state_of(probe) is State.GONE
    assert toy.changed_text() == {toy.addr("f_push"): 0xCC}, "it is somebody else's now"
    with pytest.raises(KprobeError, match="is gone: the module of"):
        toy.session.set_enabled(probe, False)
    toy.session.delete(probe)
    assert list(toy.session.probes) == []


def test_a_module_that_is_back_at_the_same_place_is_probed_anew(toy: Toy) -> None:
    toy.guest.owner = ModuleLoad("mod", VirtAddr(1), 1)
    old = toy.add("f_push")
    toy.machine.write_physical(toy.guest.memory.translate(toy.addr("f_push")), b"\x55")
    new = toy.add("p:again f_push")
    assert (toy.session.state_of(old), toy.session.state_of(new)) == (State.GONE, State.ARMED)
    assert toy.call("f_push") == 13
    assert (old.hits, new.hits) == (0, 1)


def test_a_listener_that_raises_is_dropped_and_the_hit_goes_on(toy: Toy) -> None:
    probe = toy.add("f_push")

    def listener(hit: Hit) -> None:
        raise RuntimeError("mine")

    toy.session.listen(listener)
    assert toy.call("f_push") == 13
    assert toy.call("f_push") == 13
    assert probe.hits == 2
    assert [text.splitlines()[-1] for text in toy.session.listeners.failed] == ["RuntimeError: mine"]
