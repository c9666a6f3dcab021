"""The guest harness itself: what every other live test stands on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from kprobe_guest import GuestError, GuestFailedError, GuestSpec, GuestTimeoutError, GuestVm, LaunchError
from kprobe_guest.build.initramfs import MODULES
from kprobe_guest.build.kernel import find_kernel
from kprobe_guest.cli import boot_command
from kprobe_guest.errors import SilentGuestError
from kprobe_guest.execution_log import KERNEL_TEXT, ExecutionLog
from kprobe_guest.snapshots import Snapshots
from kprobe_guest.spec import MIB
from kprobe_guest.vm import SHARED_MEMORY

BootedGuest = Callable[[GuestSpec], GuestVm]

pytestmark = pytest.mark.live

KINDS = [pytest.param(kernel, vcpus, id=f"{kernel}-{vcpus}cpu") for kernel, vcpus in (("debian", 1), ("newest", 2))]
BARE = GuestSpec(kernel="bare", memory_mb=64)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true in time"
        time.sleep(0.02)


def failed(guest: GuestVm) -> bool:
    """Never true: a failure that there is, is raised."""
    guest.check()
    return False


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def places_of_boots(spec: GuestSpec) -> set[str]:
    """Where the kernel was after a start and a reset; twice at the same of some 500 places: and after another one."""

    def where() -> str:
        return guest.check_output("grep -w _text /proc/kallsyms")

    with GuestVm(spec) as guest:
        found = {where()}
        for _ in range(2):
            if len(found) == 1:
                guest.reset()
                found.add(where())
    return found


@pytest.mark.parametrize(("kernel", "vcpus"), KINDS, scope="class")
class TestLinuxGuest:
    @pytest.fixture
    def guest(self, booted_guest: BootedGuest, kernel: str, vcpus: int) -> GuestVm:
        return booted_guest(GuestSpec(kernel=kernel, vcpus=vcpus))

    def test_runs_the_kernel_and_the_vcpus_asked_for(self, guest: GuestVm, kernel: str, vcpus: int) -> None:
        release = find_kernel(kernel).release
        assert guest.run("uname -r; nproc") == (0, f"{release}\n{vcpus}\n")

    def test_kernel_log_is_clean(self, guest: GuestVm) -> None:
        assert guest.dmesg_problems() == []

    def test_region_is_reserved(self, guest: GuestVm) -> None:
        assert guest.reserved_base is not None
        line = f"{guest.reserved_base:08x}-{guest.reserved_base + 16 * MIB - 1:08x} : Reserved"
        assert line in guest.check_output("cat /proc/iomem").splitlines()

    def test_modules_are_loaded(self, guest: GuestVm) -> None:
        modules = guest.modules()
        assert set(MODULES) <= set(modules)
        assert all(0xFFFF_FFFF_C000_0000 <= address < 0xFFFF_FFFF_FF00_0000 for address in modules.values())

    def test_kallsyms_shows_addresses_of_kernel_and_modules(self, guest: GuestVm) -> None:
        text = guest.kallsyms()
        symbols = {fields[2]: int(fields[0], 16) for line in text.splitlines() if len(fields := line.split()) == 3}
        assert symbols["_text"] >= 0xFFFF_FFFF_8100_0000
        assert symbols["_text"] % (2 * MIB) == 0
        assert f"{guest.check_output('wc -l < /proc/kallsyms').strip()}" == str(text.count("\n"))
        assert re.search(r"^[0-9a-f]{16} t dummy_xmit\t\[dummy\]$", text, re.M)

    @pytest.mark.parametrize("count", [0, 1, 23, 2003])
    def test_workload_makes_exactly_the_calls_asked_for(self, guest: GuestVm, count: int) -> None:
        # The kernel's own kprobe counts, on a call that nothing else in this guest makes.
        trace = "/sys/kernel/tracing"
        # Names of tasks are not recorded: for that the guest would switch a jump label (docs/limits.md).
        guest.check_output(
            f"echo 0 > {trace}/options/record-cmd; "
            f"echo 'p:harness __x64_sys_sched_get_priority_max' > {trace}/kprobe_events; "
            f"echo 1 > {trace}/events/kprobes/harness/enable"
        )
        try:
            assert guest.run(f"workload syscall 146 {count} 0") == (
                0,
                f"workload: {count} calls done, last result 0\n",
            )
            assert guest.check_output(f"cat {trace}/kprobe_profile").split() == ["harness", str(count), "0"]
        finally:
            guest.check_output(
                f"echo 0 > {trace}/events/kprobes/harness/enable; echo > {trace}/kprobe_events; "
                f"echo 1 > {trace}/options/record-cmd"
            )

    def test_kill_ends_a_background_load(self, guest: GuestVm) -> None:
        job = guest.spawn("workload spin 0")
        assert "workload spin 0" in guest.check_output("ps")
        assert guest.finish(job, kill=True) == (137, "")
        assert "workload spin 0" not in guest.check_output("ps")

    def test_a_reset_guest_boots_again_at_another_place(self, kernel: str, vcpus: int) -> None:
        spec = GuestSpec(kernel=kernel, vcpus=vcpus)
        try:
            assert len(places_of_boots(spec)) == 2
        except GuestFailedError as error:
            if vcpus == 1 or not error.is_of_a_switched_label:
                raise
            assert len(places_of_boots(spec)) == 2


class TestCommands:
    @pytest.fixture
    def guest(self, booted_guest: BootedGuest) -> GuestVm:
        return booted_guest(GuestSpec())

    def test_status_and_output_come_back_exactly(self, guest: GuestVm) -> None:
        assert guest.run("printf 'a\\tb\\n\\n>>x 0\\n'; echo e >&2; exit 7") == (7, "a\tb\n\n>>x 0\ne\n")

    def test_lines_of_a_command_are_told_as_they_come(self, guest: GuestVm) -> None:
        said: list[str] = []
        assert guest.follow("echo a; echo; echo b >&2; printf c; exit 7", said.append) == 7
        assert said == ["a", "", "b", "c"]
        assert guest.check_output("echo on") == "on\n"

    def test_a_syntax_error_is_a_status_not_a_hang(self, guest: GuestVm) -> None:
        status, output = guest.run("if then 'x", timeout=10)
        assert status == 2
        assert "syntax error" in output

    def test_no_byte_of_a_megabyte_is_lost(self, guest: GuestVm) -> None:
        expected = guest.check_output("head -c 1048576 /dev/urandom > /tmp/random; md5sum < /tmp/random").split()[0]
        assert hashlib.md5(guest.read_file("/tmp/random")).hexdigest() == expected

    def test_workload_takes_strings_and_buffers(self, guest: GuestVm) -> None:
        assert guest.run("workload syscall 2 3 s:/nowhere 0")[1] == "workload: 3 calls done, last result -2\n"
        assert guest.run("workload syscall 0 3 0 b: 64 < /dev/zero")[1] == "workload: 3 calls done, last result 64\n"

    @pytest.mark.parametrize("arguments", ["", "syscall", "syscall x 1", "syscall 0x 1", "syscall 1 1 1 2 3 4 5 6 7"])
    def test_workload_refuses_what_it_does_not_understand(self, guest: GuestVm, arguments: str) -> None:
        status, output = guest.run(f"workload {arguments}")
        assert status == 2
        assert output.startswith("usage: workload syscall NR N")

    def test_user_mode_int3_arrives_as_sigtrap(self, guest: GuestVm) -> None:
        assert guest.run("workload int3") == (0, "workload: SIGTRAP arrived\n")

    def test_background_job_gives_status_and_output(self, guest: GuestVm) -> None:
        job = guest.spawn("workload syscall 39 23; exit 5")
        status, output = guest.finish(job)
        assert status == 5
        assert output.startswith("workload: 23 calls done")

    def test_after_a_timeout_the_guest_takes_commands_again(self, guest: GuestVm) -> None:
        with pytest.raises(GuestTimeoutError, match="sleep 1000"):
            guest.run("sleep 1000", timeout=0.5)
        assert guest.run("echo here", timeout=10) == (0, "here\n")

    def test_a_command_that_is_followed_is_told_of_line_by_line_and_its_silence(self, guest: GuestVm) -> None:
        lines: list[str] = []
        assert guest.follow("echo one; sleep 2; echo two; exit 3", lines.append, first=1) == 3
        assert lines == ["one", "two"]
        with pytest.raises(SilentGuestError, match="sleep 1000"):
            guest.follow("sleep 1000", lines.append, first=0.5)
        with pytest.raises(GuestTimeoutError, match="echo three") as found:
            guest.follow("echo three; sleep 1000", lines.append, timeout=1, first=0.5)
        assert not isinstance(found.value, SilentGuestError)
        assert lines == ["one", "two", "three"]
        assert guest.run("echo here", timeout=10) == (0, "here\n")

    def test_too_long_a_command_is_refused(self, guest: GuestVm) -> None:
        with pytest.raises(GuestError, match="takes 4000"):
            guest.run("echo " + "x" * 4000)


class TestFailures:
    """Each has a guest of its own: it ends badly."""

    def test_panic_is_noticed_at_once(self) -> None:
        with GuestVm(GuestSpec()) as guest:
            begin = time.monotonic()
            with pytest.raises(GuestFailedError, match="Kernel panic") as caught:
                guest.run("echo c > /proc/sysrq-trigger")
            # Half a second on an idle machine; a panic that is not noticed takes the command's 60.
            assert time.monotonic() - begin < 5
            assert "sysrq triggered crash" in caught.value.console_tail
            wait_until(lambda: not guest.alive(), 10)
        assert guest.console_log.exists(), "logs of a failed guest are kept"
        assert guest.ram_path is not None
        assert not guest.ram_path.exists()
        shutil.rmtree(guest.directory)

    @pytest.mark.parametrize("vcpus", [1, 2])
    @pytest.mark.parametrize("what", ["rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", "Kernel panic"])
    def test_a_boot_is_made_again_after_a_fault_of_qemus(
        self, what: str, vcpus: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        booted: list[tuple[int, Path]] = []
        wait_ready = GuestVm.wait_ready

        def fail_once(guest: GuestVm) -> None:
            wait_ready(guest)
            booted.append((guest.pid, guest.directory))
            if len(booted) == 1:
                raise GuestFailedError(what, "", guest.directory)

        monkeypatch.setattr(GuestVm, "wait_ready", fail_once)
        again = vcpus == 2 and what != "Kernel panic"
        outcome = contextlib.nullcontext() if again else pytest.raises(GuestFailedError, match=what)
        with outcome, GuestVm(replace(BARE, vcpus=vcpus)) as guest:
            assert guest.bare_counters()
            assert [pid for pid, _ in booted].index(guest.pid) == 1
        assert len(booted) == 1 + again
        assert (what in capsys.readouterr().err) == again
        assert not any(is_running(pid) for pid, _ in booted)
        first = booted[0][1]
        assert first.exists(), "its logs are kept"
        shutil.rmtree(first)

    def test_a_warning_in_the_log_is_noticed_without_a_command(self, tmp_path: Path) -> None:
        with GuestVm(GuestSpec(), tmp_path) as guest:
            guest.run("(sleep 2; echo '<4>WARNING: made by the test' > /dev/kmsg) &")
            with pytest.raises(GuestFailedError, match="made by the test"):
                wait_until(lambda: failed(guest), 10)

    def test_killed_qemu_is_noticed(self, tmp_path: Path) -> None:
        with GuestVm(BARE, tmp_path) as guest:
            os.kill(guest.pid, signal.SIGKILL)
            wait_until(lambda: not guest.alive(), 10)
            with pytest.raises(GuestFailedError, match="QEMU ended"):
                guest.check()

    def test_bad_qemu_argument_shows_command_and_qemus_words(self, tmp_path: Path) -> None:
        guest = GuestVm(GuestSpec(kernel="bare", extra_args=("-device", "nonsense")), tmp_path)
        with pytest.raises(LaunchError, match=r"(?s)-device nonsense.*not a valid device model"):
            guest.start()

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
    def test_qemu_dies_with_its_parent(self, how: signal.Signals, tmp_path: Path) -> None:
        script = (
            "import pathlib, time; from kprobe_guest import *\n"
            f"guest = GuestVm(GuestSpec(kernel='bare'), pathlib.Path({str(tmp_path)!r}))\n"
            "guest.start(); guest.wait_ready()\n"
            "print(guest.pid, guest.ram_path, flush=True); time.sleep(100)"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd="/") as parent:
            assert parent.stdout is not None
            pid, ram = parent.stdout.readline().split()
            assert is_running(int(pid))
            parent.send_signal(how)
        wait_until(lambda: not is_running(int(pid)), 5)
        with GuestVm(BARE):
            assert not Path(ram).exists(), "memory of a dead owner is removed by the next start"


class TestMachine:
    def test_two_guests_side_by_side(self, booted_guest: BootedGuest) -> None:
        first, second = booted_guest(GuestSpec()), booted_guest(GuestSpec(vcpus=2))
        assert first.directory != second.directory
        first.check_output("echo first > /tmp/name")
        second.check_output("echo second > /tmp/name")
        assert (first.run("cat /tmp/name"), second.run("cat /tmp/name")) == ((0, "first\n"), (0, "second\n"))

    def test_paused_guest_has_not_executed_anything(self) -> None:
        guest = GuestVm(BARE)
        try:
            guest.start(paused=True)
            assert "prelaunch" in guest.hmp("info status")
            assert "EIP=0000fff0" in guest.hmp("info registers")
            guest.cont()
            guest.wait_ready(10)
        finally:
            guest.close()

    @pytest.mark.parametrize("transport", ["unix", "tcp"])
    def test_gdbstub_answers(self, transport: Literal["unix", "tcp"]) -> None:
        with GuestVm(GuestSpec(kernel="bare", gdb=transport)) as guest:
            host, _, port = guest.gdb_address.rpartition(":")
            stub = socket.create_connection((host, int(port))) if host else socket.socket(socket.AF_UNIX)
            if not host:
                stub.connect(guest.gdb_address)
            with stub:
                stub.sendall(b"$qSupported#37")
                stub.settimeout(5)
                received = b""
                while b"PacketSize=" not in received:
                    received += stub.recv(4096)

    def test_qmp_socket_is_free_for_the_user(self, booted_guest: BootedGuest) -> None:
        guest = booted_guest(BARE)
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(5)
            monitor.connect(str(guest.qmp_path))
            assert b'"QMP"' in monitor.recv(4096)

    def test_ivshmem_region_is_a_pci_device_of_the_guest(self) -> None:
        with GuestVm(GuestSpec(region="ivshmem")) as guest:
            assert guest.reserved_base is None
            assert guest.region_path is not None
            assert guest.region_path.stat().st_size == 16 * MIB
            device = guest.check_output("grep -l 0x1110 /sys/bus/pci/devices/*/device").strip()
            bar = guest.check_output(f"sed -n 3p {device.removesuffix('/device')}/resource").split()
            assert int(bar[1], 16) - int(bar[0], 16) + 1 == 16 * MIB

    @pytest.mark.parametrize(
        "spec",
        [
            GuestSpec(machine="pc"),
            GuestSpec(cpu="default"),
            GuestSpec(kaslr=False, extra_cmdline=("pti=on",)),
            GuestSpec(memory_mb=3072, region_mb=32),
            GuestSpec(shared_ram=False),
        ],
        ids=["pc", "default-cpu", "nokaslr-pti", "3GiB", "private-ram"],
    )
    def test_every_variant_boots(self, spec: GuestSpec) -> None:
        with GuestVm(spec) as guest:
            assert guest.dmesg_problems() == []
            if not spec.kaslr:
                text = guest.check_output("grep -w _text /proc/kallsyms")
                assert text == "ffffffff81000000 T _text\n"
            if guest.reserved_base is not None:
                assert f"{guest.reserved_base:08x}-" in guest.check_output("grep Reserved /proc/iomem")
        assert not guest.directory.exists()

    def test_directory_too_deep_for_a_socket_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(LaunchError, match="107"):
            GuestVm(BARE, tmp_path / ("x" * 100)).start()

    def test_region_larger_than_memory_is_refused(self) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            GuestSpec(memory_mb=64, region_mb=64)


class TestBareGuest:
    def test_is_up_at_once(self) -> None:
        begin = time.monotonic()
        with GuestVm(BARE):
            assert time.monotonic() - begin < 5  # 0.2 s on an idle machine

    def test_counters_of_all_functions_advance_in_step(self, booted_guest: BootedGuest) -> None:
        guest = booted_guest(BARE)
        before = guest.bare_counters()
        time.sleep(0.2)
        guest.stop()
        after = guest.bare_counters()
        guest.cont()
        assert all(after[name] > before[name] for name in after)
        assert max(after.values()) - min(after.values()) <= 1
        assert len(after) >= 15

    def test_own_breakpoints_are_handled_by_the_guest(self, booted_guest: BootedGuest) -> None:
        guest = booted_guest(BARE)
        want, seen = (guest.bare_image().physical(name) for name in ("want_int3", "bp_count"))
        before = guest.read_u64(seen)
        guest.ram()[want : want + 8] = (23).to_bytes(8, "little")
        wait_until(lambda: guest.read_u64(want) == 0, 5)
        assert guest.read_u64(seen) == before + 23

    def test_wrong_result_is_noticed(self, tmp_path: Path) -> None:
        with GuestVm(BARE, tmp_path) as guest:
            constant = guest.bare_image().physical("constant")
            guest.ram()[constant] = 0x35
            with pytest.raises(GuestFailedError, match="wrong result of f_lea: 0000000000001235"):
                wait_until(lambda: failed(guest), 5)

    def test_foreign_int3_is_noticed(self, tmp_path: Path) -> None:
        with GuestVm(BARE, tmp_path) as guest:
            site = guest.bare_image().symbols["f_mov"]
            # Text is written through the stub; the other end of the socket stops the machine and lets it go.
            with socket.socket(socket.AF_UNIX) as stub:
                stub.connect(guest.gdb_address)
                stub.settimeout(5)
                for packet, reply in ((f"M{site:x},1:cc", b"$OK#9a"), ("D", b"$OK#9a")):
                    stub.sendall(f"${packet}#{sum(packet.encode()) % 256:02x}".encode())
                    received = b""
                    while not received.endswith(reply):
                        received += stub.recv(4096)
                    stub.sendall(b"+")
            with pytest.raises(GuestFailedError, match=f"exception 0000000000000003 at {site + 1:016x}"):
                wait_until(lambda: failed(guest), 5)

    def test_region_is_mapped_and_unused(self, booted_guest: BootedGuest) -> None:
        guest = booted_guest(BARE)
        region = json.loads(guest.bare_image().symbols_path.read_text())["region"]
        assert f"{region['address']:016x}: {0x400000:016x}" in guest.hmp("info tlb")
        assert guest.read_ram(0x400000, region["size"]) == bytes(region["size"])


class Terminal:
    """A program at a pseudo-terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.shown = ""
        self._unread = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(30)
        os.close(self._master)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read_until(self, text: str, seconds: float) -> str:
        """What has appeared since the last call, up to *text*."""
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.shown}"
            self._read()
        before, _, self._unread = self._unread.partition(text)
        return before + text

    def wait(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end:\n{self.shown}"
            self._read()
        while self._read():
            pass
        return self._process.returncode

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 0.1)[0]:
            return False
        try:
            text = os.read(self._master, 1 << 16).decode(errors="replace")
        except OSError:
            return False  # nobody has the other end any more
        self.shown += text
        self._unread += text
        return bool(text)


class TestLauncher:
    def test_boot_prints_how_to_attach_and_ends_on_ctrl_c(self, tmp_path: Path) -> None:
        link = tmp_path / "gdb"
        command = [sys.executable, "-m", "kprobe_guest.cli", "boot", "--kernel", "bare", "--gdb", str(link)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd="/") as boot:
            assert boot.stdout is not None
            lines = [boot.stdout.readline() for _ in range(4)]
            directory = Path(lines[0].split()[-1])
            assert lines[3].startswith("attach:")
            assert "kprobe attach" in lines[3]
            assert link.is_socket()
            boot.send_signal(signal.SIGINT)
            assert boot.wait(10) == 130
        assert not directory.exists()
        assert not link.is_symlink()

    def test_ctrl_c_at_the_console_goes_to_the_guest(self) -> None:
        with Terminal([sys.executable, "-m", "kprobe_guest.cli", "boot"]) as boot:
            said = boot.read_until(" # ", 120)
            assert "All keys are the guest's, Ctrl-C too; Ctrl-A x ends it, Ctrl-A h helps." in said
            boot.type("while :; do echo rou''nd; sleep 1; done\r")
            boot.read_until("round", 30)
            boot.type("\x03")
            boot.read_until(" # ", 30)
            boot.type("echo still $((40 + 2))\r")
            boot.read_until("still 42", 30)
            boot.type("\x01h")
            boot.read_until("Ctrl-A x       end the guest", 30)
            boot.type("\x01x")
            assert boot.wait(30) == 0
            assert "Traceback" not in boot.shown
            assert "KeyboardInterrupt" not in boot.shown
            match = re.search(r"logs and sockets in (\S+)", said)
            assert match is not None
            assert not Path(match[1]).exists()

    def test_ctrl_c_before_the_console_is_there_ends_without_a_trace_of_ours(self, tmp_path: Path) -> None:
        directory = tmp_path / "guest"
        command = [sys.executable, "-m", "kprobe_guest.cli", "boot", "--directory", str(directory)]
        with Terminal(command) as boot:
            wait_until((directory / "qemu.command").exists, 60)
            boot.type("\x03")
            assert boot.wait(60) == 130, boot.shown
            assert boot.shown.strip() == "^C"

    def test_boot_command_repeats_a_spec(self) -> None:
        spec = GuestSpec(vcpus=2, cpu="default", kaslr=False, extra_cmdline=("pti=on", "quiet"))
        expected = "gdb-kprobe boot --kernel debian --vcpus 2 --cpu default --no-kaslr --append 'pti=on quiet'"
        assert boot_command(spec) == expected


class TestPrivacy:
    """What a guest writes to the host is its memory, or gives control over it: its owner's alone."""

    @pytest.fixture(autouse=True)
    def open_umask(self) -> Iterator[None]:
        before = os.umask(0)
        yield
        os.umask(before)

    @staticmethod
    def modes_of(guest: GuestVm) -> dict[str, str]:
        """File modes by name, of all that the harness has made for *guest*."""
        paths = [*guest.directory.iterdir(), guest.ram_path, guest.region_path]
        return {path.name: stat.filemode(path.lstat().st_mode) for path in paths if path is not None}

    @pytest.mark.parametrize("region", ["reserved", "ivshmem"])
    def test_all_of_a_guest_is_its_owners_alone(self, region: Literal["reserved", "ivshmem"]) -> None:
        with GuestVm(GuestSpec(region=region)) as guest:
            Snapshots(guest)
            assert stat.filemode(guest.directory.stat().st_mode) == "drwx------"
            modes = self.modes_of(guest)
            memory = [path.name for path in (guest.ram_path, guest.region_path) if path is not None]
            files = {"console.log", "qemu.command", "qemu.stderr", "snapshots.qcow2", *memory}
            sockets = {"gdb", "qmp", "harness-qmp", "console", "channel"}
            assert modes == {**dict.fromkeys(files, "-rw-------"), **dict.fromkeys(sockets, "srwx------")}

    def test_a_new_directory_is_private_and_one_that_is_there_keeps_its_mode(self, tmp_path: Path) -> None:
        with GuestVm(BARE, tmp_path / "new" / "guest") as guest:
            assert stat.filemode(guest.directory.stat().st_mode) == "drwx------"
        there = tmp_path / "there"
        there.mkdir(mode=0o755)
        # Of an earlier guest, or put there by others: readable by all, or a link to what they want overwritten.
        victim = tmp_path / "victim"
        victim.write_text("untouched")
        (there / "console.log").write_text("old")
        (there / "qemu.stderr").symlink_to(victim)
        (there / "qemu.command").write_text("old")
        with GuestVm(BARE, there) as guest:
            assert stat.filemode(there.stat().st_mode) == "drwxr-xr-x"
            assert {mode[1:] for mode in self.modes_of(guest).values()} == {"rw-------", "rwx------"}
        assert victim.read_text() == "untouched"

    def test_a_directory_in_which_all_may_replace_files_is_refused(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o777)
        with pytest.raises(LaunchError, match=r"every user may replace files in .*; take another directory"):
            GuestVm(BARE, tmp_path).start()
        tmp_path.chmod(0o1777)
        with GuestVm(BARE, tmp_path):
            pass

    def test_the_log_of_executed_instructions_is_private(self) -> None:
        with GuestVm(replace(BARE, extra_args=KERNEL_TEXT)) as guest:
            guest.stop()
            log = ExecutionLog(guest)
            log.open()
            guest.cont()
            wait_until(lambda: bool(list(SHARED_MEMORY.glob(f"gdb-kprobe-*-{guest.directory.name}.log*"))), 5)
            guest.stop()
            modes = {
                stat.filemode(path.stat().st_mode)
                for path in SHARED_MEMORY.glob(f"gdb-kprobe-*-{guest.directory.name}.*")
            }
            log.close()
            assert modes == {"-rw-------"}
