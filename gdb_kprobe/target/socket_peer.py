"""Which process of this host is at the other end of a socket, as far as ``/proc`` tells."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_ESTABLISHED = "01"
"""TCP state of a connection in ``/proc/net/tcp`` (include/net/tcp_states.h)."""

_CONNECTED = "03"
"""State of a connected socket in ``/proc/net/unix`` (``SS_CONNECTED``, include/uapi/linux/net.h)."""

_UCRED = struct.Struct("3i")
"""``struct ucred``: pid, uid, gid (unix(7))."""


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


def _listener(sock: socket.socket) -> int:
    """Who called listen(): of a QEMU with ``-daemonize`` a process that has ended. 0: in another PID namespace."""
    pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(pid)


def _unix_inodes(path: str) -> frozenset[str]:
    """The connected sockets of whoever bound *path*."""
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
