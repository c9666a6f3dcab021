"""Probes in every context that the kernel can be in: idle, interrupts, NMIs, and with AC or DF set.

What the kernel does by itself is compared with QEMU's execution log and with the guest's own rows in /proc, the rest
with an exact number of calls or NMIs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import pytest

from gdb_kprobe.model import Reason, VirtAddr
from gdb_kprobe.testing import GdbMi
from gdb_kprobe.x86.decode import Insn, iter_insns
from kprobe_guest import GuestSpec
from kprobe_guest.execution_log import KERNEL_TEXT, ExecutionLog
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot, Probed

pytestmark = pytest.mark.live

SCHED_SETATTR = 314
"""``sched_setattr(pid, attr, flags)`` reads ``attr->size`` by ``get_user``, in ``__get_user_4``."""
CALLS = 23
AC, DF = 1 << 18, 1 << 10
"""Flags: user memory may be accessed; string instructions go down."""


on_both_kernels = pytest.mark.parametrize("kernel", ["debian", pytest.param("newest", marks=pytest.mark.full)])
on_both_rungs = pytest.mark.parametrize("rung", ["optimized", "boosted"])
on_both_rungs_and_counts = pytest.mark.parametrize(
    ("rung", "vcpus"),
    [
        ("optimized", 2),
        ("boosted", 1),
        pytest.param("optimized", 1, marks=pytest.mark.full),
        pytest.param("boosted", 2, marks=pytest.mark.full),
    ],
)


def spec(kernel: str, vcpus: int) -> GuestSpec:
    return GuestSpec(kernel=kernel, vcpus=vcpus, extra_args=KERNEL_TEXT)


def executed(guest: Probed, gdb: GdbMi, work: Callable[[], object], addrs: Iterable[int]) -> Counter[int]:
    """How often each of *addrs* was executed during *work*, says QEMU; the guest is stopped before and afterwards."""
    log, wanted = ExecutionLog(guest.guest), set(addrs)
    log.open(one_instruction=False)  # the entry of a function begins a block anyway
    gdb.cont()
    work()
    gdb.interrupt()
    counts = log.close(range(min(wanted), max(wanted) + 1))
    return Counter({addr: counts[addr] for addr in wanted})


def row(guest: Probed, file: str, name: str) -> int:
    """A row of /proc/interrupts or /proc/softirqs, the sum over the CPUs."""
    words = guest.guest.check_output(f"grep -w {name}: /proc/{file}").split()[1:]
    return sum(int(word) for word in words if word.isdigit())


@on_both_rungs_and_counts
@on_both_kernels
@pytest.mark.parametrize(
    ("function", "file", "name"),
    [
        pytest.param("schedule_idle", "", "", id="idle"),  # only the idle task calls it
        pytest.param("hrtimer_interrupt", "interrupts", "LOC", id="interrupt"),
        pytest.param("run_timer_softirq", "softirqs", "TIMER", id="softirq"),
    ],
)
def test_the_kernel_by_itself(
    probed: Boot, kernel: str, rung: str, vcpus: int, function: str, file: str, name: str
) -> None:
    guest = probed(spec(kernel, vcpus))
    bounds: list[tuple[int, int]] = []

    def work() -> None:
        before = row(guest, file, name) if file else 0
        first = guest.hits(gdb)["it"]
        inner = row(guest, file, name) if file else 0
        guest.guest.check_output("sleep 0.3")
        inner = row(guest, file, name) - inner if file else 0
        hits = guest.hits(gdb)["it"] - first
        outer = row(guest, file, name) - before if file else 0
        bounds.append((inner, outer))
        assert hits > 0
        if file:
            # The other vCPUs may be between the guest's counter and the probe at each look.
            assert inner - (vcpus - 1) <= hits <= outer + (vcpus - 1)

    with guest.gdb() as gdb:
        probe = guest.add(gdb, f"p:it {function}", rung)
        assert probe["rung"] == rung
        entry = int(probe["asked"], 16)  # the probe is behind it, where no block begins
        counts = executed(guest, gdb, work, [entry])
        assert guest.hits(gdb) == {"it": counts[entry]}
        print(f"{counts[entry]} hits; the guest's own counter around the work: {bounds}")
        gdb.console("kprobe detach")


@on_both_rungs_and_counts
@on_both_kernels
def test_an_nmi(probed: Boot, kernel: str, rung: str, vcpus: int) -> None:
    """What asks the chipset for the NMI's reason is called by each NMI and by nothing else."""
    guest = probed(spec(kernel, vcpus))
    with guest.gdb() as gdb:
        assert guest.add(gdb, "p:it default_get_nmi_reason", rung)["rung"] == rung
        gdb.cont()
        first = seen = row(guest, "interrupts", "NMI")
        for _ in range(CALLS):  # one after the other: a CPU holds back one NMI, not two
            guest.guest.qmp("inject-nmi")
            deadline = time.monotonic() + 10
            while (now := row(guest, "interrupts", "NMI")) == seen:
                assert time.monotonic() < deadline, "the NMI does not arrive"
            seen = now
        gdb.interrupt()
        # Linux lets the NMI line through to the first CPU alone.
        assert guest.hits(gdb) == {"it": seen - first} == {"it": CALLS}
        gdb.console("kprobe detach")


@on_both_rungs_and_counts
@on_both_kernels
def test_ac_is_set(probed: Boot, kernel: str, rung: str, vcpus: int) -> None:
    """Between stac and clac of ``__get_user_4``, behind the instruction that may fault."""
    guest = probed(spec(kernel, vcpus))
    linux = guest.snapshot.guest
    start = linux.kallsyms.address("__get_user_4")
    mnemonics = []
    for insn in iter_insns(linux.memory.read(start, 64), VirtAddr(start)):
        mnemonics.append(insn.mnemonic)
        if linux.fixup_of(insn.addr):
            break
    addr = insn.end
    assert "stac" in mnemonics
    assert "clac" not in mnemonics

    def work() -> None:
        jobs = [guest.guest.spawn(f"workload syscall {SCHED_SETATTR} {CALLS} 0 b: 0") for _ in range(vcpus)]
        done = (0, f"workload: {CALLS} calls done, last result 0\n")
        assert [guest.guest.finish(job) for job in jobs] == [done] * vcpus

    with guest.gdb() as gdb:
        assert guest.add(gdb, f"p:all {addr:#x}", rung)["rung"] == rung
        guest.add(gdb, f"p:with {addr:#x} if flags & {AC:#x}", rung)
        gdb.cont()
        work()
        gdb.interrupt()
        assert guest.hits(gdb) == {"all": CALLS * vcpus, "with": CALLS * vcpus}
        gdb.console("kprobe detach")


@on_both_rungs
@on_both_kernels
def test_df_is_set(probed: Boot, kernel: str, rung: str) -> None:
    """Between std and cld of ``memmove``, which a system call is sent to instead of its own function."""
    guest = probed(spec(kernel, 1))
    linux = guest.snapshot.guest
    start = linux.kallsyms.address("memmove")
    refusal = linux.refusal_at(linux.place_of(VirtAddr(start)), 1)
    if refusal is not None and refusal.reason is Reason.NOINSTR:
        pytest.skip(f"memmove, where DF is set, is not to be probed on this kernel: {refusal.reason}")
    addr = next(cld(iter_insns(linux.memory.read(start, 512), VirtAddr(start))))
    with guest.gdb() as gdb:
        assert guest.add(gdb, f"p:it {addr:#x} if flags & {DF:#x}", rung)["rung"] == rung
        for calls in range(1, 4):
            move_downwards(guest, gdb, start)
            assert guest.hits(gdb) == {"it": calls}
        gdb.console("kprobe detach")


def cld(insns: Iterable[Insn]) -> Iterator[int]:
    """The addresses of the clds that follow a std."""
    is_down = False
    for insn in insns:
        if is_down and insn.mnemonic == "cld":
            yield insn.addr
        is_down = insn.mnemonic == "std" or (is_down and insn.mnemonic != "cld")


def move_downwards(guest: Probed, gdb: GdbMi, memmove: int) -> None:
    """Have the guest call *memmove* with overlapping buffers at the unused end of a task's stack."""
    size, distance, stack_size, above_magic = 1024, 256, 1 << 14, 1024
    gdb.console(f"tbreak *{guest.snapshot.guest.kallsyms.address('__x64_sys_getpriority'):#x}")
    gdb.cont()
    job = guest.guest.spawn(f"sleep 1; workload syscall {GETPRIORITY} 1")  # not before the job is known to run
    gdb.wait_stop(30)
    sp = gdb.evaluate("$rsp")
    source = sp - sp % stack_size + above_magic
    data = bytes(index * 7 % 251 for index in range(size))
    gdb.command(f"-data-write-memory-bytes {source:#x} {data.hex()}")
    return_to = gdb.evaluate("*(unsigned long *)$rsp")
    values = {"rdi": source + distance, "rsi": source, "rdx": size, "rip": memmove}
    for register, value in values.items():
        gdb.console(f"set var ${register} = {value:#x}")
    gdb.console(f"tbreak *{return_to:#x}")
    gdb.cont()
    gdb.wait_stop(30)
    assert gdb.pc == return_to
    assert gdb.evaluate("$rax") == source + distance
    assert not int(gdb.console("print/x $eflags").split("=")[1], 16) & DF
    moved = gdb.command(f"-data-read-memory-bytes {source:#x} {size + distance}")["memory"][0]["contents"]
    assert bytes.fromhex(moved) == data[:distance] + data
    gdb.cont()
    guest.guest.finish(job)
    gdb.interrupt()
