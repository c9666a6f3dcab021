"""Guest RAM in another process's memory: a process of our own stands for QEMU, and says itself what it holds."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.errors import TargetError
from gdb_kprobe.model import PAGE_SIZE, PhysAddr
from gdb_kprobe.target import ram
from gdb_kprobe.target.process_memory import ProcessMemory, find_process_memory
from gdb_kprobe.target.ram import RamView
from gdb_kprobe.target.socket_peer import peer_processes

START = PhysAddr(0x1000_0000)
PAGES = 4
NOBODY = 65534
SIZE = PAGES * PAGE_SIZE

# Four pages, each filled with its number; prints where they are, changes the first byte at each line of its input.
HOLDER = f"""
import ctypes, mmap, sys
pages = mmap.mmap(-1, {SIZE})
for page in range({PAGES}):
    pages[page * {PAGE_SIZE} : (page + 1) * {PAGE_SIZE}] = bytes([page + 1]) * {PAGE_SIZE}
print(ctypes.addressof(ctypes.c_char.from_buffer(pages)), flush=True)
for line in sys.stdin:
    pages[0] = int(line)
    print("done", flush=True)
"""

# Serves one connection on the socket that is its standard input, and holds it until it is killed.
SERVER = """
import socket, sys, time
connection, _ = socket.socket(fileno=0).accept()
print("accepted", flush=True)
time.sleep(60)
"""


class Holder:
    """The process, and where its pages are."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.host = int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def set_first_byte(self, value: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{value}\n")
        self.process.stdin.flush()
        assert self.line() == "done"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Machine:
    """A stub and a monitor that know the same pages; *hosts* is what ``gpa2hva`` answers for the two ends."""

    def __init__(self, *hosts: int | str) -> None:
        self.hosts = list(hosts)
        self.pages = b"".join(bytes([page + 1]) * PAGE_SIZE for page in range(PAGES))

    def monitor(self, command: str) -> str:
        first, last = f"gpa2hva {START:#x}", f"gpa2hva {START + SIZE - 1:#x}"
        found = self.hosts[[first, last].index(command)]
        addr = command.split()[1]
        return found if isinstance(found, str) else f"Host virtual address for {addr} (pc.ram) is {found:#x}\r\n"

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        return self.pages[addr - START : addr - START + size]

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        raise AssertionError("nothing is written")

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@pytest.fixture
def holder() -> Iterator[Holder]:
    made = Holder()
    yield made
    made.end()


def machine_of(holder: Holder) -> Machine:
    return Machine(holder.host, holder.host + SIZE - 1)


def test_memory_is_read_as_it_changes(holder: Holder) -> None:
    memory = find_process_memory(machine_of(holder), [holder.process.pid], START, SIZE)
    assert memory.read_physical(PhysAddr(START + PAGE_SIZE - 2), 4) == bytes([1, 1, 2, 2])
    holder.set_first_byte(99)
    assert memory.read_physical(START, 2) == bytes([99, 1])
    assert memory.name == f"process memory of QEMU (pid {holder.process.pid})"
    memory.close()


def test_only_its_own_piece_is_read(holder: Holder) -> None:
    memory = find_process_memory(machine_of(holder), [holder.process.pid], START, SIZE)
    assert memory.covers(START, SIZE)
    for addr, size in ((START - 1, 2), (START, SIZE + 1), (START + SIZE, 1)):
        assert not memory.covers(PhysAddr(addr), size)
        with pytest.raises(TargetError, match="not in the memory that was found"):
            memory.read_physical(PhysAddr(addr), size)
    memory.close()


def test_a_process_that_ended_is_told_and_never_taken_for_another(holder: Holder) -> None:
    memory = find_process_memory(machine_of(holder), [holder.process.pid], START, SIZE)
    holder.end()
    with pytest.raises(TargetError, match=f"process {holder.process.pid} has ended"):
        memory.read_physical(START, 8)
    memory.close()


def test_the_process_that_holds_the_memory_is_found_among_others(holder: Holder) -> None:
    other = Holder()
    try:
        machine = machine_of(holder)
        other.set_first_byte(7)
        memory = find_process_memory(machine, [2**22 + 1, other.process.pid, holder.process.pid], START, SIZE)
        assert memory.pid == holder.process.pid
        memory.close()
    finally:
        other.end()


def test_a_process_that_holds_something_else_is_refused(holder: Holder) -> None:
    holder.set_first_byte(7)
    with pytest.raises(TargetError, match=r"process \d+ \(python.*\) does not hold this guest's memory"):
        find_process_memory(machine_of(holder), [holder.process.pid], START, SIZE)


def test_an_address_that_the_process_does_not_have_is_refused(holder: Holder) -> None:
    with pytest.raises(TargetError, match="has no memory for physical 0x10000000"):
        find_process_memory(Machine(0x1000, 0x1000 + SIZE - 1), [holder.process.pid], START, SIZE)


def test_a_process_that_is_not_there_is_told() -> None:
    with pytest.raises(TargetError, match=r"memory of process 4194305 \(ended\) cannot be opened: No such file"):
        find_process_memory(Machine(0x1000, 0x1000 + SIZE - 1), [2**22 + 1], START, SIZE)


def test_no_process_at_all_is_told() -> None:
    with pytest.raises(TargetError, match="no process of ours on this host"):
        find_process_memory(Machine(0x1000, 0x1000 + SIZE - 1), [], START, SIZE)


def test_memory_in_two_pieces_is_refused() -> None:
    with pytest.raises(TargetError, match="not one piece"):
        find_process_memory(Machine(0x1000, 0x1000 + SIZE), [1], START, SIZE)


def test_what_is_no_ram_is_refused_in_qemus_words() -> None:
    answer = "Memory at address 0x10000000 is not RAM\r\n"
    with pytest.raises(TargetError, match=r"Memory at address 0x10000000 is not RAM$"):
        find_process_memory(Machine(answer, 0), [1], START, SIZE)


def test_a_view_reads_what_is_live_and_goes_back_to_the_stub_when_the_process_ends(holder: Holder) -> None:
    machine = machine_of(holder)
    view = RamView(machine, None)
    assert view.live(START, SIZE) is None
    view.use_process(find_process_memory(machine, [holder.process.pid], START, SIZE))
    holder.set_first_byte(55)
    assert view.read_physical(START, 1) == bytes([55])
    assert isinstance(view.live(START, SIZE), ProcessMemory)
    holder.end()
    assert view.read_physical(START, 1) == bytes([1]), "by the stub"
    assert view.live(START, SIZE) is None
    assert view.not_live == f"process {holder.process.pid} has ended"


class WholeMachine(Machine):
    """One whose RAM is these pages, with a page table in the second of them."""

    def monitor(self, command: str) -> str:
        if command == "info mtree -f":
            line = f"  {START:016x}-{START + SIZE - 1:016x} (prio 0, ram): pc.ram"
            return f'FlatView #1\n AS "memory", root: system\n{line}\n'
        return super().monitor(command)

    def cpus(self) -> tuple[int, ...]:
        return (1,)

    def read_register(self, cpu: int, name: str) -> int:
        assert (cpu, name) == (1, "cr3")
        return START + PAGE_SIZE | 0x18  # with flags beside the address


@pytest.mark.parametrize("same", [True, False])
def test_all_ram_is_read_from_the_process_that_has_this_guests_page_table(
    holder: Holder, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    monkeypatch.setattr(ram, "_BULK", SIZE)
    machine: Any = WholeMachine(holder.host, holder.host + SIZE - 1)
    if not same:
        pages = bytearray(machine.pages)
        pages[PAGE_SIZE + 8] ^= 1
        machine.pages = bytes(pages)
    view = RamView(machine, None)
    view.use_ram_of(machine, [holder.process.pid])
    assert view.is_live(START, SIZE) is same
    holder.set_first_byte(55)
    assert view.read_physical(START, 1) == bytes([55 if same else 1])


def test_without_a_process_ram_is_read_by_the_stub() -> None:
    machine: Any = WholeMachine()
    view = RamView(machine, None)
    view.use_ram_of(machine, [])
    assert view.live(START, SIZE) is None


def peers_seen_by_client(listener: socket.socket) -> tuple[int, tuple[int, ...]]:
    """The PID of a process that accepts a connection at *listener*, and who we think is there."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=listener.fileno(), stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        with socket.socket(listener.family) as client:
            client.connect(listener.getsockname())
            assert server.stdout.readline() == b"accepted\n"
            listener.close()  # as of a daemon's parent
            return server.pid, peer_processes(client.fileno())
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("address", [("127.0.0.1", 0), ("::1", 0), ("::ffff:127.0.0.1", 0)])
def test_who_is_at_the_other_end_of_a_tcp_connection(address: tuple[str, int]) -> None:
    listener = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    listener.bind(address)
    listener.listen(1)
    pid, found = peers_seen_by_client(listener)
    assert found == (pid,)


def test_who_is_at_the_other_end_of_a_unix_socket_whoever_listened(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen(1)
    pid, found = peers_seen_by_client(listener)
    assert found == (pid,), "this process has called listen(), and is not its own peer"


def test_nobody_is_at_the_other_end_of_what_is_no_connection() -> None:
    with socket.socket() as unconnected:
        assert peer_processes(unconnected.fileno()) == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")
def test_a_process_of_another_user_is_told(holder: Holder) -> None:
    pid, machine = holder.process.pid, machine_of(holder)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            find_process_memory(machine, [pid], START, SIZE)
        except TargetError as error:
            os.write(writing, error.message.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert re.fullmatch(
        rf"the memory of process {pid} \(python.*\) cannot be opened: Permission denied \(another user's.*\)", said
    )
