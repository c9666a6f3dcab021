"""Lines of QEMU's execution log to counts."""

from __future__ import annotations

from collections import Counter

from kprobe_guest.execution_log import Faults, count_executions, count_faults

# As QEMU 7.2 writes them.
LOG = (
    b"Trace 0: 0x7f24d40e1100 [0000000000000000/ffffffffb9a5f2c0/0040c2b4/ff000201] \n"
    b"Trace 1: 0x7f24d40e1240 [0000000000000000/ffffffffb9a5f2c4/0040c2b4/ff000201] \n",
    b"Trace 0: 0x7f24d40e1240 [0000000000000000/ffffffffb9a5f2c4/0040c2b4/ff000201] \n"
    b"Stopped execution of TB chain before 0x7f24d40e1240 [ffffffffb9a5f2c4] \n"
    b"Trace 0: 0x7f24d40e1380 [0000000000000000/ffffffffb9a61000/0040c2b4/ff000201] sym\n"
    b"Stopped execution of TB chain before 0x7f24d40e1380 [ffffffffb9a61000] sym\n",
)


def test_entries_less_those_that_were_taken_back() -> None:
    assert count_executions(LOG) == Counter({0xFFFFFFFFB9A5F2C0: 1, 0xFFFFFFFFB9A5F2C4: 1})


def test_only_the_range_asked_for() -> None:
    assert count_executions(LOG, range(0xFFFFFFFFB9A5F2C1, 0xFFFFFFFFB9A61000)) == Counter({0xFFFFFFFFB9A5F2C4: 1})
    assert count_executions(LOG, range(0xFFFFFFFFB9A5F2C0, 0xFFFFFFFFB9A5F2C1)) == Counter({0xFFFFFFFFB9A5F2C0: 1})
    assert count_executions(LOG, range(0xFFFFFFFFB9A5F2C5, 0xFFFFFFFFB9A61001)) == Counter()


def test_faults_are_told_from_what_follows_on_the_same_vcpu() -> None:
    fault, *steps = 0xFFFFFFFFB9C00B70, 0xFFFFFFFFB9A5F2C0, 0xFFFFFFFFB9A5F2C4
    entries = [
        (0, steps[0]), (1, steps[1]), (0, steps[1]), (0, fault), (0, 0xFFFFFFFFB9A00000), (0, fault),
        (1, steps[0]), (1, fault), (0, steps[1]),
    ]  # fmt: skip
    log = b"".join(b"Trace %d: 0x7f24d40e1100 [%016x/%016x/0040c2b4/ff000201] \n" % (cpu, 0, pc) for cpu, pc in entries)
    addresses = range(steps[0], steps[1] + 1)
    assert count_faults([log], addresses, Faults(fault, frozenset(steps))) == Counter({steps[1]: 1, steps[0]: 1})
    assert count_faults([log], addresses, Faults(fault, frozenset(steps[:1]))) == Counter({steps[0]: 1})
