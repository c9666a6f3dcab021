"""TAB on the guest's symbols: functions and nothing else, as /proc/kallsyms has them; also while the guest runs."""

from __future__ import annotations

import pytest

from kprobe_guest import GuestSpec, GuestVm
from tests.support.probed import Boot

pytestmark = pytest.mark.live

BEGINNING = "cpu_"
"""Functions, data and both kinds of per-CPU symbols begin so."""
TRACER = "/sys/kernel/tracing/current_tracer"


def functions(kallsyms: str, module: str = "") -> set[str]:
    lines = (line.split() for line in kallsyms.splitlines())
    suffix = [f"[{module}]"] if module else []
    return {line[2] for line in lines if line[1] in "tTwW" and line[3:] == suffix}


def listed(vm: GuestVm, module: str) -> str:
    return vm.check_output(rf"grep -e ' {BEGINNING}' -e '\[{module}\]' /proc/kallsyms")


def load_anew(vm: GuestVm, module: str, tracer: str) -> None:
    """Have *module* loaded while *tracer* of the guest's is on."""
    vm.check_output(f"echo {tracer} > {TRACER}", timeout=120)
    vm.check_output(f"rmmod {module} && insmod /modules/{module}.ko", timeout=120)
    vm.check_output(f"echo nop > {TRACER}", timeout=120)


def test_functions_of_kernel_and_modules(probed: Boot) -> None:
    guest = probed(GuestSpec())
    vm, module = guest.guest, "loop"
    load_anew(vm, module, "nop")
    kallsyms = listed(vm, module)
    load_anew(vm, module, "function")
    # ftrace keeps the names of functions of its init that it has traced, and the file shows them: their code is gone
    # (kernel/trace/ftrace.c, ``ftrace_free_mem``).
    assert "loop_init" in functions(listed(vm, module), module) - functions(kallsyms, module)
    core = {name for name in functions(kallsyms) if name.startswith(BEGINNING)}
    data = {line.split()[2] for line in kallsyms.splitlines()} - functions(kallsyms) - functions(kallsyms, module)
    with guest.gdb() as gdb:
        gdb.console("set max-completions unlimited")

        def offered(begun: str) -> set[str]:
            return {line.split()[-1] for line in gdb.console(f"complete kprobe {begun}").splitlines() if line}

        def check() -> None:
            for command in ("add", "plan", "check", "p"):
                assert offered(f"{command} {BEGINNING}") == core
                assert offered(f"{command} {module}:") == {f"{module}:{name}" for name in functions(kallsyms, module)}
                assert f"{module}:" in offered(f"{command} {module[:-1]}")
            assert any(name.startswith(BEGINNING) for name in data)

        check()
        gdb.cont()
        check()
        assert guest.guest.is_running()
        gdb.interrupt()
        gdb.console("kprobe detach")
