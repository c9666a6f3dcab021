"""``./install.sh matrix``: cells of userland, kernel, accelerator and kind of guest, each run where it belongs.

A cell is a program of its own, in the cell's userland. Whatever becomes of it is its row: the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gdb_kprobe.errors import KprobeError, ReportedError
from kprobe_guest.build.cache import cache_directory
from tests.matrix.cells import DEMO, Cell, all_cells
from tests.matrix.processes import last_line, run_logged
from tests.matrix.rows import Result, Row, markdown, summary
from tests.matrix.userland import Chroot, Here, Userland, UserlandMissingError, own_name
from tests.support.command import Command

_CELL_TIMEOUT = 3600.0
"""Seconds: a cell may build a kernel first."""

_ERROR = re.compile(r"[\w.]+Error: |(gdb-kprobe|torture): ")
"""The line of Python's trace that says what went wrong, or the error of the cell's program."""

_SUITES = {"debian12": "bookworm", "debian13": "trixie"}
"""The suites of userlands that have another name."""

_STATUS = {0: Result.PASSED, 77: Result.SKIPPED}

_VERSIONS = """
v=$(qemu-system-x86_64 --version | sed -nE '1s/.*version ([0-9.]+).*/\\1/p'); printf 'QEMU %s, ' "$v"
v=$(gdb --version | sed -nE '1s/.* ([0-9.]+).*/\\1/p'); printf 'gdb %s, ' "$v"
gdb -batch -nx -ex 'python import platform; print("Python", platform.python_version())'
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cells whose name matches")
    parser.add_argument("--full", action="store_true", help="do in each cell all that one can do, not only count")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to a file")


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status: 0 if no cell failed.

    :raises KprobeError: no cell's name matches, or the table cannot be written.
    """
    try:
        cells = [cell for cell in all_cells() if re.search(options.only, str(cell))]
    except re.error as error:
        raise KprobeError(f"--only {options.only}: {error}", "it is a regular expression of Python's") from error
    if not cells:
        raise KprobeError(f"no cell's name matches {options.only!r}", "./install.sh matrix --list has the names")
    if options.list:
        print("\n".join(map(str, cells)))
        return 0
    if options.markdown is not None and not options.markdown.absolute().parent.is_dir():
        raise KprobeError(f"--markdown {options.markdown}: there is no such directory", "make it first")
    versions: dict[str, str] = {}
    rows: list[Row] = []
    try:
        for userland in dict.fromkeys(cell.userland for cell in cells):
            of_it = [cell for cell in cells if cell.userland == userland]
            for row in _run_userland(userland, of_it, versions, full=options.full):
                rows.append(row)  # those that there are when the run is interrupted are shown
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    if options.markdown is not None:
        only = (" --full" if options.full else "") + (f" --only '{options.only}'" if options.only else "")
        options.markdown.write_text(markdown(rows, versions, f"./install.sh matrix{only}"))
    print(summary(rows))
    return 1 if len(rows) < len(cells) or any(row.result is Result.FAILED for row in rows) else 0


def _run_userland(name: str, cells: Sequence[Cell], versions: dict[str, str], *, full: bool) -> Iterator[Row]:
    logs = cache_directory() / "matrix"
    print(f"{name}: {len(cells)} {'cell' if len(cells) == 1 else 'cells'}", flush=True)
    with contextlib.ExitStack() as reserved:
        try:
            userland = _userland(name)
            reserved.enter_context(userland.reserved())
            userland.prepare()
            versions[name] = _versions(userland, logs / f"{name}.versions")
        except (ReportedError, OSError) as error:
            result = Result.SKIPPED if isinstance(error, UserlandMissingError) else Result.FAILED
            for cell in cells:
                row = Row(cell, result, _one_line(error))
                print(row, flush=True)
                yield row
            return
        print(f"{name}: {versions[name]}", flush=True)
        yield from _run_cells(userland, cells, logs, full=full)


def _userland(name: str) -> Userland:
    if name == own_name():
        return Here()
    suite, _, more = name.partition("-")
    return Chroot(_SUITES.get(suite, suite), cache_directory() / "userlands" / name, backports=more == "backports")


def _versions(userland: Userland, log: Path) -> str:
    log.unlink(missing_ok=True)
    run_logged(userland.command("sh", "-c", _VERSIONS), log, "asking for versions", 120)
    return last_line(log)


def _run_cells(userland: Userland, cells: Sequence[Cell], logs: Path, *, full: bool) -> Iterator[Row]:
    for cell in cells:
        log = logs / f"{str(cell).replace('/', '_')}.log"
        log.unlink(missing_ok=True)
        started = time.monotonic()
        try:
            program, *words = cell.words(full=full)
            command = userland.command(userland.program(program), *words)
            status = run_logged(command, log, str(cell), _CELL_TIMEOUT)
            result, detail = _STATUS.get(status, Result.FAILED), _said(cell, log, status)
        except (ReportedError, OSError) as error:
            result, detail = Result.FAILED, _one_line(error)
        row = Row(cell, result, detail, time.monotonic() - started)
        print(row, flush=True)
        if result is Result.FAILED:
            print(f"    the whole output is in {log}", flush=True)
        yield row


def _said(cell: Cell, log: Path, status: int) -> str:
    """What a cell says of itself: what its result is followed by, which failures it names, or how it ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    word, _, detail = (lines or [""])[-1].partition(" ")
    if cell.options != DEMO and word in set(Result):
        return detail
    failed = [line.removeprefix("FAILED: ") for line in lines if line.startswith("FAILED: ")]
    errors = [line for line in lines if _ERROR.match(line)]
    how = "" if status == 0 else f"ended with status {status}: "
    return "; ".join(failed) or how + (errors if errors and status else lines or ["no output"])[-1]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


COMMAND = Command("matrix", "run cells of userland, kernel, accelerator and kind of guest", arguments, run)
