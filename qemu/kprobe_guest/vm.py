"""A guest and its QEMU, from start to end.

The machine belongs to the process that started it: QEMU dies with it. Everything it writes is in a directory of its
own, which is removed at the end unless the guest failed. No other user of the host can read it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu.qmp import QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

from kprobe_guest.boot_files import boot_files
from kprobe_guest.build.bare import BareImage, build_bare_image
from kprobe_guest.channel import READY_MARKER, ChannelClosedError, CommandChannel
from kprobe_guest.command_line import GuestPaths, SavedMachine, qemu_command
from kprobe_guest.commands import GuestCommands
from kprobe_guest.console import ConsoleLog, find_problems
from kprobe_guest.errors import GuestError, GuestFailedError, GuestTimeoutError, LaunchError
from kprobe_guest.patience import patient, slowness
from kprobe_guest.private import UMASK, private_directory, private_file
from kprobe_guest.spec import MIB, GuestSpec

BOOT_TIMEOUT = 150.0
"""Seconds in which a guest is up: thirty times what it takes, for a host that has other things to do."""

_START_TIMEOUT = 20.0
"""Seconds in which QEMU has its sockets."""

TICK = 0.1
"""Seconds between two looks at the console and at QEMU while waiting for something else."""

SOCKET_PATH_LIMIT = 107
"""Characters of a unix socket's path (unix(7))."""

SHARED_MEMORY = Path("/dev/shm")


_4_GIB = 1 << 32


class GuestVm(GuestCommands):
    """One guest. Use as a context manager: ``with GuestVm(GuestSpec(vcpus=2)) as guest: guest.run("uname -r")``.

    With *saved* it does not boot: it is a copy of that machine, and goes on where that one was.
    """

    def __init__(
        self, spec: GuestSpec | None = None, directory: Path | None = None, saved: SavedMachine | None = None
    ) -> None:
        super().__init__()
        self.spec = spec or GuestSpec()
        self._given_directory = directory
        self._saved = saved
        self._paths: GuestPaths | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: QEMUMonitorProtocol | None = None
        self._channel: CommandChannel | None = None
        self._console: ConsoleLog | None = None
        self._ram: mmap.mmap | None = None
        self._gdb_port: int | None = None
        self._resetting = False
        self._failed = False

    # -- names of things ------------------------------------------------------------------------------------------

    @property
    def paths(self) -> GuestPaths:
        if self._paths is None:
            raise GuestError("the guest was not started")
        return self._paths

    @property
    def directory(self) -> Path:
        return self.paths.directory

    @property
    def gdb_address(self) -> str:
        """What gdb's ``target remote`` takes: a socket's path or ``localhost:PORT``."""
        return str(self.paths.gdb) if self._gdb_port is None else f"localhost:{self._gdb_port}"

    @property
    def qmp_path(self) -> Path:
        """A QMP socket for tests and users; the harness has another."""
        return self.paths.qmp

    @property
    def console_log(self) -> Path:
        return self.paths.console_log

    @property
    def ram_path(self) -> Path | None:
        """The file that is the guest's RAM, offset = physical address below 2 GiB; ``None`` when it is private."""
        return self.paths.ram if self.spec.shared_ram else None

    @property
    def region_path(self) -> Path | None:
        """The file behind the ivshmem device."""
        return self.paths.region if self.spec.region == "ivshmem" else None

    @property
    def reserved_base(self) -> int | None:
        return self.spec.reserved_base

    @property
    def channel(self) -> CommandChannel:
        if self.spec.kernel == "bare":
            raise GuestError("a bare-metal guest runs no commands")
        if self._channel is None:
            raise GuestError("the guest was not started, or has ended")
        return self._channel

    @property
    def console(self) -> ConsoleLog:
        if self._console is None:
            raise GuestError("the guest was not started")
        return self._console

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    # -- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._boot()
        except (GuestFailedError, GuestTimeoutError) as error:
            # Nobody has touched the guest yet. With one vCPU there is no such fault: one of several may also take the
            # int3 of a label for ever, and say nothing.
            by_itself = isinstance(error, GuestTimeoutError) or error.is_of_a_switched_label
            if self.spec.vcpus == 1 or not by_itself:
                raise
            print(f"kprobe_guest: booting once more: {error}", file=sys.stderr)
            self._process, self._failed = None, False
            self._boot()
        return self

    def _boot(self) -> None:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.close(keep=True)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=self._failed)

    def start(self, *, paused: bool = False) -> None:
        """Launch QEMU; with *paused* the machine stays at its reset vector until :meth:`cont`.

        :raises LaunchError: QEMU did not come up.
        :raises BuildError: there is nothing to boot.
        """
        assert self._process is None, "already started"
        boot = boot_files(self.spec)
        self._paths = self._make_paths()
        self._console = ConsoleLog(self.console_log)
        self._gdb_port = _free_port() if self.spec.gdb == "tcp" else None
        command = qemu_command(self.spec, boot, self.paths, self._gdb_port, self._saved, slow=slowness() > 1)
        try:
            self._launch(command)
            self._connect(deadline=time.monotonic() + patient(_START_TIMEOUT))
            if self._saved is not None:
                self._load(self._saved)
        except BaseException:
            self.close(keep=True)
            raise
        if not paused:
            self.cont()

    def _launch(self, command: list[str]) -> None:
        private_file(self.paths.command).write_text(shlex.join(command) + "\n")
        # QEMU would take files that are there as they are, whatever its umask.
        private_file(self.console_log)
        for memory in (self.ram_path, self.region_path):
            if memory is not None:
                private_file(memory)
        if self._saved is not None and self.spec.shared_ram:
            copy_memory(self._saved.ram, self.paths.ram)
        with private_file(self.paths.stderr).open("wb") as stderr:
            # setpriv asks the kernel to kill QEMU when the thread that started it ends, however it ends. In a group of
            # its own, QEMU is not ended by a Ctrl-C that is meant for the program that started it.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, umask=UMASK, process_group=0,
            )  # fmt: skip

    def _make_paths(self) -> GuestPaths:
        if self._given_directory is not None:
            directory = private_directory(self._given_directory)
        else:
            # In /tmp whatever TMPDIR says: it may be too long.
            directory = Path(tempfile.mkdtemp(prefix=f"gdb-kprobe-{self.spec.label()}-", dir="/tmp"))
        if len(longest := str(directory / "harness-qmp")) > SOCKET_PATH_LIMIT:
            raise LaunchError(f"{longest} is too long for a socket ({SOCKET_PATH_LIMIT} characters); use /tmp")
        _remove_orphaned_memory()
        memory = memory_directory(self.spec, directory)
        name = f"gdb-kprobe-{os.getpid()}-{directory.name}"
        return GuestPaths(directory, memory / f"{name}.ram", memory / f"{name}.region")

    def _connect(self, deadline: float) -> None:
        # QEMU makes its sockets in the order of its command line; the user's monitor is the last.
        while not self.paths.qmp.exists():
            self._require_running("while starting")
            if time.monotonic() > deadline:
                raise LaunchError(f"QEMU does not come up; its command line is in {self.paths.command}")
            time.sleep(0.01)
        try:
            self._monitor = QEMUMonitorProtocol(str(self.paths.harness_qmp))
            self._monitor.connect()
            self._channel = CommandChannel(self.paths.channel)
        except (OSError, QMPError) as error:
            # It has ended, most often, and is not quite gone: then its own words say why.
            assert self._process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            self._require_running("while starting")
            raise LaunchError(f"QEMU does not answer; its command line is in {self.paths.command}: {error}") from error

    def _load(self, saved: SavedMachine) -> None:
        """Have QEMU read the devices of a machine that was saved."""
        self.share_memory()
        self.qmp("migrate-incoming", uri=f"exec:cat {shlex.quote(str(saved.devices))}")
        self.wait_migrated()
        # A snapshot of the copy has memory in it, or loading it would leave that as it is.
        self.share_memory(False)

    def share_memory(self, state: bool = True) -> None:
        """Have QEMU leave memory that is a file out of what it saves and loads (experimental, since QEMU 4.0)."""
        wanted = [{"capability": "x-ignore-shared", "state": state}]
        self.qmp("migrate-set-capabilities", capabilities=wanted)

    def wait_migrated(self, timeout: float = 60) -> None:
        """Wait until QEMU has saved, or loaded, the machine.

        :raises GuestError: it cannot, or is not done in *timeout* seconds.
        """
        deadline = time.monotonic() + patient(timeout)
        while True:
            answer = self.qmp("query-migrate")
            assert isinstance(answer, dict)
            if (status := answer.get("status")) == "completed":
                return
            if status == "failed" or time.monotonic() > deadline:
                raise GuestError(f"QEMU cannot save or load the machine: {answer}")
            time.sleep(0.005)

    def _require_running(self, when: str) -> None:
        assert self._process is not None
        if (status := self._process.poll()) is not None:
            raise LaunchError(
                f"QEMU ended {when} (status {status})\n  {self.paths.command.read_text().strip()}\n"
                f"  {self.paths.stderr.read_text(errors='replace').strip()}"
            )

    def wait_ready(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Wait until the guest's shell (or the bare-metal guest's loop) is up.

        :raises GuestFailedError: it failed on the way.
        :raises GuestTimeoutError: it did not come up in *timeout* seconds.
        """
        if self._saved is not None and not self._resetting:
            self.check_output("true", timeout)  # its shell has said long ago that it listens
            return
        deadline = time.monotonic() + patient(timeout)
        while not (self._bare_is_ready() if self.spec.kernel == "bare" else self.channel.take_ready()):
            self._tick(deadline, "the guest to come up")
        if self._resetting:
            self.qmp("set-action", reboot="shutdown")
            self._resetting = False

    def _bare_is_ready(self) -> bool:
        return self.console.has_line_of_this_boot(READY_MARKER)

    def quit(self) -> None:
        """End QEMU politely; kill it when it does not listen."""
        if self.alive():
            with contextlib.suppress(QMPError, OSError):
                self.qmp("quit")
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert self._process is not None
                self._process.wait(5)
        self.kill()

    def kill(self) -> None:
        """End QEMU at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self, *, keep: bool = False) -> None:
        """End QEMU and remove what it left; with *keep* the logs stay. May be called twice."""
        self.quit()
        if self._monitor is not None:
            with contextlib.suppress(Exception):  # the other end is gone: whatever it says about that
                self._monitor.close()
            self._monitor = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._ram is not None:
            self._ram.close()
            self._ram = None
        if self._paths is not None:
            self._paths.ram.unlink(missing_ok=True)
            self._paths.region.unlink(missing_ok=True)
            if self._given_directory is None and not keep:
                shutil.rmtree(self._paths.directory, ignore_errors=True)

    def alive(self) -> bool:
        """Whether QEMU runs (the guest in it may be stopped)."""
        return self._process is not None and self._process.poll() is None

    # -- looking after it -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Look at the console and at QEMU.

        :raises GuestFailedError: the console shows a failure, or QEMU ended.
        """
        if problem := find_problems(self.console.new_text()):
            # The rest of the report (registers, call trace) is still on its way.
            time.sleep(0.3)
            self._fail(problem[0])
        if not self.alive():
            assert self._process is not None
            self._fail(f"QEMU ended (status {self._process.returncode})")

    def console_tail(self) -> str:
        """The console's last lines."""
        return self.console.tail()

    def _fail(self, what: str) -> None:
        self._failed = True
        raise GuestFailedError(what, self.console_tail(), self.directory)

    def _tick(self, deadline: float, waiting_for: str) -> None:
        """Wait a moment for the channel, looking after the guest meanwhile."""
        try:
            got = self._channel is not None and self._channel.receive(TICK)
        except ChannelClosedError:
            time.sleep(TICK)
            got = False
        if got:
            return
        self.check()
        if time.monotonic() > deadline:
            self._failed = True
            raise GuestTimeoutError(
                f"waited in vain for {waiting_for}; is the VM stopped? {self._positions()}\n"
                f"  artefacts: {self.directory}\n"
                f"  end of the console:\n{self.console_tail()}"
            )

    def _positions(self) -> str:
        """Where the vCPUs are, to find out why nothing goes on."""
        try:
            found = re.findall(r"^RIP=([0-9a-f]+)", self.hmp("info registers -a"), re.M)
        except (QMPError, OSError):
            return "QEMU does not answer"
        return f"its vCPUs are at {', '.join(found)}"

    # -- its memory -----------------------------------------------------------------------------------------------

    def bare_image(self) -> BareImage:
        """The bare-metal guest's image, with its symbols."""
        assert self.spec.kernel == "bare", self.spec
        return build_bare_image()

    def bare_counters(self) -> dict[str, int]:
        """How often each function of the bare-metal guest was called: its own counters, read while it runs."""
        image = self.bare_image()
        return {name: self.read_u64(image.physical(f"count_{name}")) for name in image.functions}

    def read_u64(self, physical: int) -> int:
        return int.from_bytes(self.read_ram(physical, 8), "little")

    def read_ram(self, physical: int, size: int) -> bytes:
        """Guest RAM by physical address, also while the guest runs."""
        start = physical if physical < _4_GIB else physical - _4_GIB + self.spec.low_memory
        return bytes(self.ram()[start : start + size])

    def ram(self) -> mmap.mmap:
        """The host's mapping of the guest's RAM."""
        if self._ram is None:
            if not self.spec.shared_ram:
                raise GuestError("this guest's RAM is private to QEMU; set shared_ram in its GuestSpec")
            with self.paths.ram.open("r+b") as file:
                self._ram = mmap.mmap(file.fileno(), 0)
        return self._ram

    # -- the machine ----------------------------------------------------------------------------------------------

    def qmp(self, command: str, **arguments: object) -> object:
        """Execute one QMP command and return its result.

        :raises QMPError: QEMU refused it or is gone.
        """
        assert self._monitor is not None, "not started"
        return self._monitor.cmd(command, **arguments)

    def hmp(self, command: str) -> str:
        """Execute one command of the text monitor and return what it printed."""
        return str(self.qmp("human-monitor-command", **{"command-line": command})).replace("\r", "")

    def is_running(self) -> bool:
        """Whether its vCPUs run; QEMU has them stopped for a gdb, or :meth:`stop`."""
        status = self.qmp("query-status")
        assert isinstance(status, dict)
        return bool(status["running"])

    def stop(self) -> None:
        self.qmp("stop")

    def cont(self) -> None:
        self.qmp("cont")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Have the machine stopped during the block; one that is stopped already stays so. No gdb may be connected."""
        if not self.is_running():
            yield
            return
        self.stop()
        try:
            yield
        finally:
            self.cont()

    def reset(self, timeout: float = BOOT_TIMEOUT, *, wait: bool = True) -> None:
        """Reset the machine, as its button would; with *wait* until the guest is up again."""
        self.expect_reset()
        self.qmp("system_reset")
        if wait:
            self.wait_ready(timeout)

    def expect_reset(self) -> None:
        """Another program is about to reset the machine: :meth:`wait_ready` waits until it is up again."""
        # With -no-reboot a reset from outside, too, would end QEMU; and the firmware, when it finds that it has run
        # before, resets the machine once more by itself. Taken back when the guest is up.
        self.qmp("set-action", reboot="reset")
        self._resetting = True
        self.console.note_reset()


def memory_directory(spec: GuestSpec, otherwise: Path) -> Path:
    """Where files that are a guest's memory go: in memory, if there is room."""
    return SHARED_MEMORY if _has_room(SHARED_MEMORY, spec.memory_mb + spec.region_mb) else otherwise


def copy_memory(source: Path, target: Path) -> None:
    """Copy a file of memory: its holes stay holes, and nobody else can read the copy."""
    private_file(target)
    subprocess.run(["cp", "--sparse=always", "--", str(source), str(target)], check=True)


def _has_room(directory: Path, size_mb: int) -> bool:
    """Whether guest memory fits there: in a container /dev/shm may be 64 MiB, and QEMU gets SIGBUS when it is full."""
    if not os.access(directory, os.W_OK):
        return False
    free = os.statvfs(directory)
    return free.f_bavail * free.f_frsize >= size_mb * MIB


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _remove_orphaned_memory() -> None:
    """Remove guest memory whose owner was killed before it could do so: its name holds the owner's process id."""
    for path in SHARED_MEMORY.glob("gdb-kprobe-*"):
        owner = path.name.split("-")[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                path.unlink()
