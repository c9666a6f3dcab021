"""KVM where there is none: a command runs in a machine that QEMU's TCG emulates, whose kernel has KVM.

TCG emulates an AMD processor with SVM, so that kvm_amd works there. That machine (L1) is a guest like the others, with
a kernel by Debian's name; its commands have the very root file system that this process has, and what they write there
is gone at its end. Guests that they boot are guests of its KVM (L2). Nothing is built but a kernel's initramfs.

It is tens of times slower than KVM on a processor, and knows less: see docs/kvm.md.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kprobe_guest.build.kernel import find_kernel
from kprobe_guest.errors import BuildError, GuestError, SilentGuestError
from kprobe_guest.patience import SLOWNESS, slowness
from kprobe_guest.spec import GuestSpec
from kprobe_guest.vm import GuestVm

_KVM = Path("/dev/kvm")
_CPU = Path("/proc/cpuinfo")

KERNEL = "6.12-generic"
"""Debian's cloud kernels have no KVM."""

SPEC = GuestSpec(
    kernel=KERNEL,
    vcpus=2,
    memory_mb=3072,
    region="none",
    shared_ram=False,
    root="host",
    # Programs of today need cmpxchg16b; with five levels of page tables a guest of the guest does not run.
    extra_args=("-cpu", "max,la57=off"),
    # It is emulated on a machine that may have other things to do: nothing is wrong with a vCPU that waits.
    extra_cmdline=(
        "mitigations=off",
        "rcupdate.rcu_cpu_stall_suppress=1",
        "nosoftlockup",
        "transparent_hugepage=always",
    ),
)

_SLOWER = 20
"""How many times slower than this machine one is that runs guests of KVM in L1: generous, for it is for time limits."""

_PASSED_ON = re.compile(r"GDB_KPROBE_\w+|XDG_CACHE_HOME|KPROBE_\w+|COLUMNS")
"""Variables that a command has in L1 as it has them here."""


def what_kvm_lacks(device: Path = _KVM, cpu: Path = _CPU) -> str | None:
    """Say why no guest of ours runs under this machine's KVM; ``None`` if that can be.

    A KVM without the processor's extension (kvm_pvm, which hosts of containers offer) runs only kernels made for it.
    """
    if not device.exists():
        return f"there is no {device}"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened by this user"
    flags = re.search(r"^flags\s*:(.*)$", cpu.read_text(), re.M)
    if flags is None or not {"svm", "vmx"} & set(flags[1].split()):
        return f"the processor has neither SVM nor VMX, so {device} runs no kernels but those made for it"
    return None


def prepare() -> None:
    """Fetch what L1 boots, unless it is there: the only thing that takes a network.

    :raises BuildError: it cannot be had.
    """
    try:
        find_kernel(KERNEL)
    except BuildError as error:
        raise BuildError(f"the kernel of a machine that has KVM cannot be had: {error}") from error


def run_nested(
    command: Sequence[str],
    say: Callable[[str], None],
    *,
    directory: Path | None = None,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    first: float | None = None,
) -> int:
    """Run *command* in L1, in *directory* (this process's), and *say* each line of its output; returns its status.

    :param first: seconds within which its first line comes. If it does not L1 is booted once more, and told of: TCG
        may lose a vCPU of L1 that runs a guest, in a page fault without an end.
    :raises BuildError: L1's kernel cannot be had.
    :raises GuestError: L1 does not come up, or has no KVM; or the command took more than *timeout* seconds.
    """
    prepare()
    variables = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
    variables |= {SLOWNESS: f"{_SLOWER * slowness():g}", **(environment or {})}
    words = ["env", "-C", str(directory or Path.cwd()), *(f"{name}={value}" for name, value in variables.items())]
    line = shlex.join([*words, *command])
    try:
        return _run_in_l1(line, say, timeout, first)
    except SilentGuestError as error:
        if first is None:
            raise
        say(f"booting the emulated machine once more: {str(error).splitlines()[0]}")
        return _run_in_l1(line, say, timeout, first)


def _run_in_l1(line: str, say: Callable[[str], None], timeout: float, first: float | None) -> int:
    with GuestVm(SPEC) as machine:
        status, _ = machine.run(f"test -c {_KVM}")
        if status:
            raise GuestError(f"the emulated machine has no {_KVM}\n{machine.run('dmesg | tail -n 20')[1]}")
        return machine.follow(line, say, timeout, first)
