"""A sample of ``./install.sh torture fuzz``: what readers make of a guest whose memory holds anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gdb_kprobe.model import PhysAddr
from kprobe_guest import GuestSpec
from tests.torture.fuzz import Fuzzer, Recording, record
from tests.torture.fuzz.readers import Asked, Reader

pytestmark = pytest.mark.live
MUTATIONS = 1500
SEED = 20


@pytest.fixture(scope="module")
def recorded() -> Callable[[str], Recording]:
    """A recording of each kernel, made when it is asked for: the guest is changed, and of no use to others."""
    made: dict[str, Recording] = {}

    def get(kernel: str) -> Recording:
        if kernel not in made:
            made[kernel] = record(GuestSpec(kernel=kernel, vcpus=2))
        return made[kernel]

    return get


@pytest.mark.parametrize("kernel", ["debian", "newest"])
def test_whatever_the_guest_holds_a_reader_answers_or_says_what_is_wrong(
    recorded: Callable[[str], Recording], kernel: str
) -> None:
    fuzzer = Fuzzer(recorded(kernel), SEED)
    fuzzer.run(MUTATIONS, large=0.01)
    assert [str(finding) for finding in fuzzer.findings] == []
    # Most of what is changed does not matter: but it was read, and where it did, errors of many kinds have said so.
    assert fuzzer.asked == MUTATIONS
    assert fuzzer.errors > MUTATIONS // 20
    assert fuzzer.kinds > 20


def test_a_reader_that_does_as_it_should_not_is_found(recorded: Callable[[str], Recording]) -> None:
    """The fuzzer itself: what fails, does not end, shows what it should not, or writes, is a finding."""

    def fails(asked: Asked) -> list[str]:
        asked.machine.read_physical(asked.region, 8)
        raise IndexError("out of it")

    def hangs(asked: Asked) -> list[str]:
        while True:
            asked.machine.read_physical(asked.region, 8)

    def shows(asked: Asked) -> list[str]:
        return ["\x1b[2J"]

    def writes(asked: Asked) -> list[str]:
        asked.machine.write_physical(PhysAddr(asked.region + 8), b"\xff")
        return []

    for ask, told in (
        (fails, "IndexError: out of it"),
        (hangs, "TookTooLongError"),
        (shows, r"it shows '\x1b[2J'"),
        (writes, "it wrote ff over"),
    ):
        reader = Reader("the region", ask, 1, 0.2, writes=True)
        fuzzer = Fuzzer(recorded("debian"), SEED, readers=(reader,))
        fuzzer.run(1, large=0)
        [finding] = fuzzer.findings
        assert told in finding.wrong
