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


# Runs in gdb. A packet that reads or writes memory begins with m or M; Qqemu says by which kind of addresses.
TIMED_ACTS = """
import gdb
import json
import pathlib
import time
from gdb_kprobe.gdbext import api, plugin

def bulk_link():
    return plugin.the_plugin().attachments.need_link()

bulk_acts = []

def bulk_act(name, link, act):
    packets, send, send_all = [], link.channel.send, link.channel.send_all
    def noted(packet):
        packets.append(packet)
        return send(packet)
    def all_noted(more):
        packets.extend(more)
        return send_all(more)
    link.channel.send, link.channel.send_all = noted, all_noted
    started = time.monotonic()
    try:
        return act()
    finally:
        took = time.monotonic() - started
        link.channel.send, link.channel.send_all = send, send_all
        bulk_acts.append((name, took, [packet for packet in packets if packet[:5] == b"Qqemu" or packet[:1] in b"mM"]))

def bulk_attach(profile):
    started = time.monotonic()
    gdb.execute(f"kprobe attach {profile}", to_string=True)
    print(time.monotonic() - started)
    link = bulk_link()
    resume, settle = link.arm_all, link.settle
    link.arm_all = lambda: bulk_act("continue_all", link, resume)
    link.settle = lambda: bulk_act("stop_all", link, settle)

def bulk_arm():
    link = bulk_link()
    armed, refused = bulk_act("arm_all", link, lambda: api.add_matching("*"))
    print(len(armed))

def bulk_sites(path):
    sites = [(site.addr, site.rung) for site in api.sites() if site.is_armed]
    pathlib.Path(path).write_text(json.dumps(sites))

def bulk_take(path):
    with open(path, "wb") as file:
        for name, took, packets in bulk_acts:
            file.write(json.dumps([name, took, len(packets)]).encode() + b"\\n")
            file.writelines(packet + b"\\n" for packet in packets)
    bulk_acts.clear()
"""
"""Notes what acts on all sites take in gdb, and the packets that read and write memory in them."""
