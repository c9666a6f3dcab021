"""The workload program: assembled from data/workload.S by binutils, statically, without a C library."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from kprobe_guest.build.cache import cache_directory, run_tool, write_atomically

SOURCE = Path(__file__).resolve().parent.parent / "data" / "workload.S"


def build_workload() -> Path:
    """Assemble the program (or find it) and return its path.

    :raises BuildError: binutils is missing, or does not like the source.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = cache_directory() / "workload" / digest
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="gdb-kprobe-as-") as directory:
            assembled = Path(directory) / "workload.o"
            linked = Path(directory) / "workload"
            run_tool(["as", "--64", "-o", str(assembled), str(SOURCE)], package="binutils")
            run_tool(["ld", "-static", "-s", "-o", str(linked), str(assembled)], package="binutils")
            write_atomically(path, linked.read_bytes())
    return path
