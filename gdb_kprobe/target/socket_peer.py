"""Which process of this host is at the other end of a socket, as far as ``/proc`` tells."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Collection, Iterator
from pathlib import Path

_ESTABLISHED = "01"
"""TCP state of a connection in ``/proc/net/tcp`` (include/net/tcp_states.h)."""

_CONNECTED = "03"
"""State of a connected socket in ``/proc/net/unix`` (``SS_CONNECTED``, include/uapi/linux/net.h)."""

_UCRED = struct.Struct("3i")
"""``struct ucred``: pid, uid, gid (unix(7))."""


_LOOK_EVERY = 0.01
"""Seconds between two looks whether a process has ended."""

_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_SHOW_PEER = 4
_PEER = 2
"""NETLINK_SOCK_DIAG, NLM_F_REQUEST | NLM_F_DUMP, UDIAG_SHOW_PEER, UNIX_DIAG_PEER."""
_NETLINK = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_DIAG_REQUEST = struct.Struct("=BBHIIIII")
_DIAG_MESSAGE = struct.Struct("=BBBBIII")
"""``struct nlmsghdr``, ``nlattr``, ``unix_diag_req``, ``unix_diag_msg`` (include/uapi/linux)."""


def peer_processes(descriptor: int) -> tuple[int, ...]:
    """The PIDs that may be at the other end of the socket *descriptor*, the likeliest first.

    Empty when it is on another host, in another PID namespace, or belongs to another user: their open files are not
    shown to us. Nothing is sent, and no second connection is made: a gdbstub would serve it after the first.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            if sock.family == socket.AF_UNIX:
                found = [_listener(sock), *_holders(_unix_inodes(sock.getpeername()))]
            else:
                found = list(_holders(_tcp_inodes(_endpoint(sock.getpeername()), _endpoint(sock.getsockname()))))
    except OSError:
        return ()
    return tuple(dict.fromkeys(pid for pid in found if pid not in (0, os.getpid())))


def clients_of(address: str) -> tuple[tuple[int, str], ...]:
    """Who is connected to the server at *address* (a unix socket's path, or ``host:port`` of this host).

    PID and command line of each; those of other users are not shown to us, and left out.
    """
    path = address.removeprefix("unix:")
    if "/" in path:
        peers = _unix_peers()
        inodes = frozenset(str(peers[int(inode)]) for inode in _unix_inodes(path) if int(inode) in peers)
    else:
        port = path.rpartition(":")[2]
        rows = [line.split() for table in ("/proc/net/tcp", "/proc/net/tcp6") for line in _lines(table)]
        inodes = frozenset(
            row[9] for row in rows if row[3] == _ESTABLISHED and str(_unpacked(row[2])[1]) == port and row[9] != "0"
        )
    return tuple((pid, _command_of(pid)) for pid in _holders(inodes))


def is_input_of_another(descriptor: int) -> bool:
    """Whether the other end of the unix socket *descriptor* is the standard input of another process.

    So it is of the pair of sockets that a debugger makes for a command it starts (``target remote | COMMAND``), and of
    no other that the debugger may have open; ``False`` where sock_diag(7) is not to be had.
    """
    wanted = f"socket:[{_unix_peers().get(os.fstat(descriptor).st_ino)}]"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if int(process.name) != os.getpid() and os.readlink(process / "fd" / "0") == wanted:
                return True
    return False


def _unix_peers() -> dict[int, int]:
    """The inode of each connected unix socket of this host -> that of its peer (sock_diag(7)); empty without that."""
    found: dict[int, int] = {}
    request = _DIAG_REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFF_FFFF, 0, _SHOW_PEER, 0, 0)
    header = _NETLINK.pack(_NETLINK.size + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
    with contextlib.suppress(OSError, struct.error), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _DIAG) as sock:
        sock.settimeout(1)
        sock.sendall(header + request)
        while True:
            data = sock.recv(1 << 16)
            while data:
                length, kind, *_ = _NETLINK.unpack_from(data)
                if kind != _SOCK_DIAG_BY_FAMILY or length < _NETLINK.size:
                    return found  # done, or an error
                _, _, _, _, inode, _, _ = _DIAG_MESSAGE.unpack_from(data, _NETLINK.size)
                at = _NETLINK.size + _DIAG_MESSAGE.size
                while at + _ATTRIBUTE.size <= length:
                    size, attribute = _ATTRIBUTE.unpack_from(data, at)
                    if attribute == _PEER:
                        found[inode] = int.from_bytes(data[at + _ATTRIBUTE.size : at + size], "little")
                    at += max(size + 3 & -4, _ATTRIBUTE.size)
                data = data[length + 3 & -4 :]
    return found


def have_ended(pids: Collection[int], within: float) -> bool:
    """Whether all the processes *pids* have ended, or do so within some seconds; not if none is known."""
    deadline = time.monotonic() + within
    while pids and time.monotonic() < deadline:
        if not any(is_alive(pid) for pid in pids):
            return True
        time.sleep(_LOOK_EVERY)
    return False


def is_alive(pid: int) -> bool:
    """Whether the process *pid* is there, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    return ""


def _listener(sock: socket.socket) -> int:
    """Who called listen(): of a QEMU with ``-daemonize`` a process that has ended. 0: in another PID namespace."""
    pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(pid)


def _unix_inodes(path: str) -> frozenset[str]:
    """The connected sockets of the process that bound *path*."""
    # Num RefCount Protocol Flags Type State Inode Path
    rows = (line.split(maxsplit=7) for line in _lines("/proc/net/unix"))
    return frozenset(row[6] for row in rows if row[5] == _CONNECTED and row[7:] == [path])


def _tcp_inodes(local: tuple[str, int], remote: tuple[str, int]) -> frozenset[str]:
    """The established sockets of this host whose own end is *local* and whose other end is *remote*."""
    # sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode
    rows = [line.split() for table in ("/proc/net/tcp", "/proc/net/tcp6") for line in _lines(table)]
    return frozenset(
        row[9] for row in rows if row[3] == _ESTABLISHED and (_unpacked(row[1]), _unpacked(row[2])) == (local, remote)
    )


def _endpoint(name: tuple[str, int]) -> tuple[str, int]:
    """(address, port), an IPv4 address mapped into IPv6 as what it is."""
    address = ipaddress.ip_address(name[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address), name[1]


def _unpacked(text: str) -> tuple[str, int]:
    """``0100007F:04D2`` -> (``127.0.0.1``, 1234). The kernel prints each 32 bits of an address as a number."""
    number, _, port = text.partition(":")
    words = (int(number[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(number), 8))
    return _endpoint((str(ipaddress.ip_address(b"".join(words))), int(port, 16)))


def _holders(inodes: frozenset[str]) -> Iterator[int]:
    """The processes that have one of the sockets *inodes* open."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*") if wanted else ():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(os.readlink(entry) in wanted for entry in (process / "fd").iterdir()):
                yield int(process.name)


def _lines(table: str) -> list[str]:
    """The rows of *table* without its headings; none where the kernel has no such table."""
    try:
        return Path(table).read_text().splitlines()[1:]
    except OSError:
        return []
