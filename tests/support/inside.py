"""Text for gdb that reaches behind the Python API, which offers to ask and to act, and not to break what is there.

All there is of it, so that each new one has to be argued for: what only asks belongs in ``api``.
"""

from __future__ import annotations

from typing import Final

CUT: Final = (
    "python import os, socket; from gdb_kprobe.gdbext.channel import *; "
    "socket.socket(fileno=os.dup(GdbChannel().descriptor)).shutdown(socket.SHUT_RDWR)"
)
"""What a network that goes away does to gdb's connection: gdb shows nobody the socket."""


def take_for_qemu(pid: int) -> str:
    """Have the next attach take the process *pid* for the QEMU behind the connection.

    A machine where a wrong one is a candidate has two that hold the same socket, which no test can make by itself.
    """
    return f"python from gdb_kprobe.gdbext import link; link.peer_processes = lambda descriptor: ({pid},)"
