"""Guest RAM through the memory of QEMU's process, where QEMU does not share it: for use while the guest runs.

Where a piece of guest RAM lies in the process is asked of QEMU once (``gpa2hva``); from then on it is a read of
``/proc/PID/mem``, which takes microseconds and stops nothing. Only ever for data: text that is written past QEMU's back
leaves old translated code running (docs/internals/connection.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import PAGE_SIZE, PhysAddr, offset
from gdb_kprobe.target.protocols import Monitor, PhysicalMemory

_GPA2HVA = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((.+)\) is (?:0x)?([0-9a-f]+)")
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class Stub(PhysicalMemory, Monitor, Protocol):
    """Guest memory as QEMU has it, and QEMU's word for where that is."""


class ProcessMemory:
    """*size* bytes of guest memory at physical *start*, which are at *host* in the process *pid*.

    The file is opened once, and is the memory of that process for ever: when the process has ended, reads fail, also
    when its number is another process's by then (``mem_open`` in the kernel's fs/proc/base.c keeps the memory, and not
    the number).
    """

    def __init__(self, pid: int, host: int, start: PhysAddr, size: int) -> None:
        """:raises TargetError: its memory may not be read."""
        self.pid = pid
        self._host = host
        self._start = start
        self._size = size
        try:
            self._file = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TargetError(
                f"the memory of process {pid} ({_name(pid)}) cannot be opened: {error.strerror}{_why_denied(error)}"
            ) from error

    @property
    def name(self) -> str:
        """For the user."""
        return f"process memory of QEMU (pid {self.pid})"

    def covers(self, addr: PhysAddr, size: int) -> bool:
        return self._start <= addr and addr + size <= self._start + self._size

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        """Read *size* bytes.

        :raises TargetError: they are not in this piece of memory, or the process has ended.
        """
        if not self.covers(addr, size):
            raise TargetError(f"physical {addr:#x} (+{size}) is not in the memory that was found in process {self.pid}")
        try:
            data = os.pread(self._file, size, self._host + addr - self._start)
        except (OSError, OverflowError) as error:
            raise TargetError(f"process {self.pid} has no memory for physical {addr:#x}: {error}") from error
        if len(data) != size:
            raise TargetError(
                f"process {self.pid} has ended" if not data else f"process {self.pid} unmapped its memory"
            )
        return data

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        """Write data: never what is executed.

        :raises TargetError: they are not in this piece of memory, or the process has ended.
        """
        if not self.covers(addr, len(data)):
            raise TargetError(f"physical {addr:#x} (+{len(data)}) is not in the memory found in process {self.pid}")
        try:
            written = os.pwrite(self._file, data, self._host + addr - self._start)
        except (OSError, OverflowError) as error:
            raise TargetError(f"process {self.pid} has no memory for physical {addr:#x}: {error}") from error
        if written != len(data):
            raise TargetError(f"process {self.pid} has ended")

    def close(self) -> None:
        os.close(self._file)


def find_process_memory(stub: Stub, pids: Iterable[int], start: PhysAddr, size: int) -> ProcessMemory:
    """Find the *size* bytes of guest memory at *start* in the first of the processes *pids* that has them.

    The first and the last page must be what the stub reads there. The first one is to hold something that nothing else
    on this host does (the region's header has a random cookie): then it is that memory, and the process is the guest's
    QEMU.

    :raises TargetError: no process has them, or its memory may not be read; says what each lacks.
    """
    host = _host_address(stub, start, size)
    reasons: list[str] = []
    for pid in pids:
        try:
            memory = ProcessMemory(pid, host, start, size)
        except TargetError as error:
            reasons.append(error.message)
            continue
        try:
            for page in (start, offset(start, size - PAGE_SIZE)):
                if memory.read_physical(page, PAGE_SIZE) != stub.read_physical(page, PAGE_SIZE):
                    raise TargetError(f"process {pid} ({_name(pid)}) does not hold this guest's memory")
        except TargetError as error:
            memory.close()
            reasons.append(error.message)
            continue
        return memory
    raise TargetError("; ".join(reasons) or "no process of ours on this host is at the other end of the connection")


def _host_address(monitor: Monitor, start: PhysAddr, size: int) -> int:
    """Where guest physical *start* .. *start* + *size* lies in QEMU's process.

    :raises TargetError: QEMU does not tell, or it is not one piece.
    """
    (name, first), (last_name, last) = (_ask(monitor, addr) for addr in (start, offset(start, size - 1)))
    if (last_name, last) != (name, first + size - 1):
        raise TargetError(f"physical {start:#x} (+{size:#x}) is not one piece in QEMU's memory ({name}, {last_name})")
    return first


def _ask(monitor: Monitor, addr: PhysAddr) -> tuple[str, int]:
    """The memory that guest physical *addr* is in, and its address in QEMU's process."""
    answer = monitor.monitor(f"gpa2hva {addr:#x}").strip()
    found = _GPA2HVA.search(answer)
    if found is None:
        raise TargetError(f"QEMU does not say where physical {addr:#x} is in its memory: {answer or 'no answer'}")
    return found[1], int(found[2], 16)


def _name(pid: int) -> str:
    """The name of process *pid*, as ``ps`` shows it."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "ended"


def _why_denied(error: OSError) -> str:
    """Which rule of the host's forbids it, as far as it can be told."""
    if not isinstance(error, PermissionError):
        return ""
    try:
        scope = _YAMA.read_text().strip()
    except OSError:
        scope = "0"
    return " (another user's)" if scope == "0" else f" (another user's, or kernel.yama.ptrace_scope={scope})"
