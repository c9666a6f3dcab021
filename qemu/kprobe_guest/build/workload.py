"""The workload program: assembled from data/workload*.S by binutils, statically, without a C library."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from kprobe_guest.build.cache import cache_directory, run_tool, write_atomically

DATA = Path(__file__).resolve().parent.parent / "data"
SOURCES = (DATA / "workload.S", DATA / "workload_parts.S", DATA / "workload_bpf.S")

SPIN = "spin"
"""No system calls: 40 ms of user mode a round."""

PARTS = (
    "files", "names", "pipes", "memory", "processes", "signals",
    "futexes", "timers", "tasks", "sockets", "identity", "copies", SPIN,
)  # fmt: skip
"""The kinds of work of ``workload part`` and ``workload serve``."""


def build_workload() -> Path:
    """Assemble the program (or find it) and return its path.

    :raises BuildError: binutils is missing, or does not like the source.
    """
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:16]
    path = cache_directory() / "workload" / digest
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="gdb-kprobe-as-") as directory:
            linked = Path(directory) / "workload"
            objects = [str(Path(directory) / f"{source.stem}.o") for source in SOURCES]
            for source, assembled in zip(SOURCES, objects, strict=True):
                run_tool(["as", "--64", "-o", assembled, str(source)], package="binutils")
            run_tool(["ld", "-static", "-s", "-o", str(linked), *objects], package="binutils")
            write_atomically(path, linked.read_bytes())
    return path
