"""KVM where there is none: the emulated machine's command line, and time limits that follow a stated slowness."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gdb_kprobe.launcher.cli import main
from kprobe_guest import GuestError, nesting
from kprobe_guest.command_line import BootFiles, GuestPaths, kernel_command_line, qemu_command
from kprobe_guest.errors import BuildError
from kprobe_guest.patience import SLOWNESS, patient
from kprobe_guest.spec import GuestSpec
from tests import torture

PATHS = GuestPaths(Path("/d"), Path("/d/ram"), Path("/d/region"))
BOOT = BootFiles(Path("/k"), Path("/i"))


def test_time_limits_follow_the_stated_slowness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SLOWNESS, raising=False)
    assert patient(20) == 20
    monkeypatch.setenv(SLOWNESS, "2.5")
    assert patient(20) == 50


@pytest.mark.parametrize("text", ["", "fast", "0", "0.5", "-3", "nan", "inf"])
def test_a_slowness_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(SLOWNESS, text)
    with pytest.raises(GuestError, match="how many times slower than usual"):
        patient(1)


def test_a_guest_on_a_slow_machine_takes_no_delay_for_a_stall() -> None:
    stall = "rcupdate.rcu_cpu_stall_suppress=1"
    assert stall not in kernel_command_line(GuestSpec()).split()
    assert stall in kernel_command_line(GuestSpec(), slow=True).split()
    assert stall in " ".join(qemu_command(GuestSpec(), BOOT, PATHS, slow=True)).split()


def test_the_memory_of_a_guest_of_kvm_can_be_mapped_in_large_pages() -> None:
    aligned = qemu_command(GuestSpec(accelerator="kvm"), BOOT, PATHS)
    assert any(word.startswith("memory-backend-file,id=ram,") and word.endswith(",align=2M") for word in aligned)


def test_the_emulated_machine_reads_the_hosts_files_and_cannot_write_them() -> None:
    command = qemu_command(nesting.SPEC, BOOT, PATHS)
    share = command[command.index("-virtfs") + 1].split(",")
    assert {"local", "path=/", "readonly=on"} <= set(share)
    assert "guest.root=host" in command[command.index("-append") + 1].split()
    assert "-virtfs" not in qemu_command(GuestSpec(), BOOT, PATHS)


def test_a_cell_under_kvm_without_one_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.torture.cell.boot_files", lambda spec: BOOT)
    monkeypatch.setattr(nesting, "what_kvm_lacks", lambda: "there is no /dev/kvm")
    words = ["cell", "--accelerator", "kvm"]
    assert torture.COMMAND.main(words) == 77
    assert "skipped (debian, KVM): there is no /dev/kvm; with --nested KVM is emulated" in capsys.readouterr().out

    def cannot() -> None:
        raise BuildError("no such kernel")

    monkeypatch.setattr(nesting, "prepare", cannot)
    assert torture.COMMAND.main([*words, "--nested"]) == 77
    assert "skipped (debian, KVM): no such kernel" in capsys.readouterr().out


def test_a_cell_that_has_kvm_emulated_is_the_same_command_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], say: object, *, timeout: float, first: float | None) -> int:
        ran.append(command)
        return 5

    monkeypatch.setattr("tests.torture.cell.boot_files", lambda spec: BOOT)
    monkeypatch.setattr(nesting, "what_kvm_lacks", lambda: "there is no /dev/kvm")
    monkeypatch.setattr(nesting, "prepare", lambda: None)
    monkeypatch.setattr(nesting, "run_nested", run)
    words = ["cell", "--accelerator", "kvm", "--nested", "--also", "trace"]
    assert torture.COMMAND.main(words) == 5
    assert ran == [[sys.executable, "-P", "-m", "tests.torture", *words]]


def test_a_kvm_that_runs_no_guest_of_ours_is_told_from_one_that_does(tmp_path: Path) -> None:
    device, cpu = tmp_path / "kvm", tmp_path / "cpuinfo"
    assert nesting.what_kvm_lacks(device, cpu) == f"there is no {device}"
    device.touch()
    cpu.write_text("model name\t: some\nflags\t\t: fpu hypervisor\n")
    assert "neither SVM nor VMX" in (nesting.what_kvm_lacks(device, cpu) or "")
    cpu.write_text("model name\t: some\nflags\t\t: fpu svm lm\n")
    assert nesting.what_kvm_lacks(device, cpu) is None


@pytest.mark.parametrize(("here", "there"), [("1", "20"), ("2.5", "50")])
def test_an_emulated_machine_is_slower_than_the_one_that_emulates_it(
    monkeypatch: pytest.MonkeyPatch, here: str, there: str
) -> None:
    class Machine:
        """One that runs nothing."""

        def __init__(self, spec: GuestSpec) -> None:
            pass

        def __enter__(self) -> Machine:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, command: str) -> tuple[int, str]:
            return 0, ""

        def follow(self, command: str, say: object, timeout: float, first: float | None) -> int:
            commands.append(command)
            return 0

    commands: list[str] = []
    monkeypatch.setenv(SLOWNESS, here)
    monkeypatch.setattr(nesting, "prepare", lambda: None)
    monkeypatch.setattr(nesting, "GuestVm", Machine)
    assert nesting.run_nested(["true"], print, timeout=1) == 0
    assert f"{SLOWNESS}={there}" in commands[0].split()


def test_an_act_that_is_none_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.COMMAND.main(["cell", "--also", "trace,dance"]) == 1
    assert "there is no act dance" in capsys.readouterr().err


def test_the_command_is_run_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], say: object, *, timeout: float) -> int:
        ran.append(command)
        return 7

    monkeypatch.setattr("kprobe_guest.cli.run_nested", run)
    assert main(["nested", "sh", "-c", "exit 7"]) == 7
    assert ran == [["sh", "-c", "exit 7"]]
