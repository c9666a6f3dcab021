"""The matrix: names, and rows whatever becomes of a cell."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from gdb_kprobe.errors import KprobeError
from tests import matrix
from tests.matrix.cells import OPTIONS, Cell, all_cells
from tests.matrix.processes import OverdueError, last_line, run_logged
from tests.matrix.rows import Result, Row, markdown
from tests.matrix.userland import (
    CHECKOUT,
    Chroot,
    Here,
    UserlandMissingError,
    apt_sites,
    checkout_files,
    mirror_of,
    own_name,
)


@dataclass
class Scripted:
    """A userland in which each cell is a shell script, the next one of *scripts*."""

    scripts: list[str]
    problem: KprobeError | None = None

    def reserved(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare(self) -> None:
        if self.problem is not None:
            raise self.problem

    def command(self, *words: str) -> list[str]:
        return ["sh", "-c", self.scripts.pop(0)]

    def program(self, name: str) -> str:
        return name


TORTURE = ["python", "-P", "-m", "tests.torture"]
CELLS = [Cell("debian99", "6.1-cloud", "tcg", options) for options in ("default", "2cpu", "tcp", "pc")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(matrix, "all_cells", lambda: CELLS)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, userland: Scripted, *options: str) -> int:
    monkeypatch.setattr(matrix, "_userland", lambda name: userland)
    return matrix.COMMAND.main(options)


def test_names_are_unique_and_a_userlands_cells_are_together() -> None:
    cells = all_cells()
    assert len({str(cell) for cell in cells}) == len(cells)
    userlands = [cell.userland for cell in cells]
    assert userlands == sorted(userlands, key=list(dict.fromkeys(userlands)).index)
    wanted = {"debian13/debian/tcg/demo", "debian12/7.3-cloud/tcg/default", "debian12/6.1-nomodules/tcg/borrowed"}
    assert wanted <= {str(cell) for cell in cells}


def test_a_cell_is_a_program_of_the_virtual_environment() -> None:
    demo = Cell("sid", "newest", "tcg", "demo").words()
    assert demo == ["gdb-kprobe", "demo", "--kernel", "newest", "--calls", "100"]
    small = Cell("debian12", "6.1-nomodules", "tcg", "2cpu").words()
    assert small == [*TORTURE, "cell", "--kernel", "6.1-nomodules", *OPTIONS["2cpu"]]
    assert Cell("sid", "newest", "tcg", "2cpu").words(full=True)[-2:] == ["--also", "all"]


def test_a_cell_under_kvm_has_it_emulated_where_there_is_none() -> None:
    cell = Cell("debian13", "6.1-cloud", "kvm", "2cpu")
    words = [*TORTURE, "cell", "--kernel", "6.1-cloud", *OPTIONS["2cpu"], "--accelerator", "kvm", "--nested", "--also"]
    assert cell.words() == [*words, "trace,handler,fault,ctrl-c"]
    assert cell.words(full=True) == [*words, "all"]
    assert cell in all_cells()


def test_each_cell_is_a_row_whatever_becomes_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scripts = [
        "echo QEMU 7.2, gdb 13.1, Python 3.11",
        "echo 'passed 6.1.0 (6.1-cloud): optimized; 81 hits'",
        "echo 'FAILED 6.1.0 (6.1-cloud): counted 80'; exit 1",
        "echo 'skipped (6.1-cloud): no such kernel'; exit 77",
        "echo Traceback; echo 'ZeroDivisionError: | of ours'; echo 'more lines'; exit 1",
    ]
    document = tmp_path / "support.md"
    assert run(monkeypatch, Scripted(scripts), "--markdown", str(document)) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "debian99: 4 cells"
    assert said[1] == "debian99: QEMU 7.2, gdb 13.1, Python 3.11"
    assert said[-1] == "1 passed, 2 failed, 1 skipped"
    rows = [line for line in said if "debian99/" in line and not line.startswith(" ")]
    assert rows == [
        "passed debian99/6.1-cloud/tcg/default (0 s): 6.1.0 (6.1-cloud): optimized; 81 hits",
        "FAILED debian99/6.1-cloud/tcg/2cpu (0 s): 6.1.0 (6.1-cloud): counted 80",
        "skipped debian99/6.1-cloud/tcg/tcp (0 s): (6.1-cloud): no such kernel",
        "FAILED debian99/6.1-cloud/tcg/pc (0 s): ended with status 1: ZeroDivisionError: | of ours",
    ]
    text = document.read_text()
    assert "| debian99/6.1-cloud/tcg/tcp | skipped | (6.1-cloud): no such kernel |" in text
    assert "| debian99/6.1-cloud/tcg/pc | FAILED | ended with status 1: ZeroDivisionError: / of ours |" in text
    assert "| debian99 | QEMU 7.2, gdb 13.1, Python 3.11 |" in text


def test_a_userland_that_cannot_be_had_skips_its_cells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, Scripted([], UserlandMissingError("needs root, for a chroot"))) == 0
    said = capsys.readouterr().out.splitlines()
    assert "skipped debian99/6.1-cloud/tcg/default (0 s): needs root, for a chroot" in said
    assert said[-1] == "0 passed, 0 failed, 4 skipped"


def test_a_userland_that_cannot_be_installed_fails_its_cells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, Scripted([], KprobeError("./install.sh failed (1): no network")), "--only", "2cpu") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"


def test_the_demo_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(matrix, "all_cells", lambda: [Cell("debian99", "debian", "tcg", "demo")] * 2)
    bad = "echo 'FAILED: boosted: not 5 hits of 5 calls'; echo 'FAILED, in 9 s.'; exit 1"
    assert run(monkeypatch, Scripted(["echo versions", "echo 'All as it must be, in 9 s.'", bad])) == 1
    said = capsys.readouterr().out
    assert "passed debian99/debian/tcg/demo (0 s): All as it must be, in 9 s." in said
    assert "FAILED debian99/debian/tcg/demo (0 s): boosted: not 5 hits of 5 calls" in said


def test_an_interrupted_run_shows_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Interrupted(Scripted):
        def command(self, *words: str) -> list[str]:
            if not self.scripts:
                raise KeyboardInterrupt
            return super().command(*words)

    document = tmp_path / "support.md"
    scripts = ["echo versions", "echo 'passed 6.1.0: 81 hits'"]
    assert run(monkeypatch, Interrupted(scripts), "--markdown", str(document)) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["interrupted", "1 passed, 0 failed, 0 skipped"]
    assert "| debian99/6.1-cloud/tcg/default | passed | 6.1.0: 81 hits |" in document.read_text()


def test_an_error_of_the_machines_is_the_row_of_what_it_keeps_from_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Scripted):
        def prepare(self) -> None:
            raise OSError(28, "No space left on device")

    assert run(monkeypatch, Full([])) == 1
    said = capsys.readouterr().out.splitlines()
    assert "FAILED debian99/6.1-cloud/tcg/pc (0 s): [Errno 28] No space left on device" in said
    assert said[-1] == "0 passed, 4 failed, 0 skipped"


def test_a_table_that_cannot_be_written_is_an_error_before_anything_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, Scripted([]), "--markdown", str(tmp_path / "none" / "support.md")) == 1
    assert "there is no such directory" in capsys.readouterr().err


def test_a_wrong_expression_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.COMMAND.main(["--only", "["]) == 1
    assert "unterminated character set" in capsys.readouterr().err
    assert matrix.COMMAND.main(["--only", "nosuch"]) == 1
    assert "no cell's name matches 'nosuch'" in capsys.readouterr().err


# -- programs that take long ------------------------------------------------------------------------------------------


def test_a_program_says_from_time_to_time_that_it_is_at_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tests.matrix.processes._SAY_EVERY", 0.1)
    status = run_logged(["sh", "-c", "echo step one; sleep 1; exit 3"], tmp_path / "log", "building", 60)
    assert status == 3
    assert "    building: for 0 s; step one\n" in capsys.readouterr().out


def test_a_program_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    script = f"sleep 600 & echo $! >{tmp_path}/child; wait"
    with pytest.raises(OverdueError, match=r"building took more than 1 s"):
        run_logged(["sh", "-c", script], tmp_path / "log", "building", 1)
    _wait_for_the_end(int((tmp_path / "child").read_text()))


def test_children_that_do_not_want_to_end_are_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.matrix.processes._PATIENCE", 0.5)
    script = f"(trap '' TERM; echo $$ >{tmp_path}/ready; exec sleep 600) & echo $! >{tmp_path}/child; wait"
    with pytest.raises(OverdueError):
        run_logged(["sh", "-c", script], tmp_path / "log", "building", 1)
    _wait_for_the_end(int((tmp_path / "child").read_text()))


def _wait_for_the_end(pid: int) -> None:
    deadline = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KprobeError, match="nosuch cannot be started"):
        run_logged([str(tmp_path / "nosuch")], tmp_path / "log", "nothing", 5)
    assert last_line(tmp_path / "none") == "no output yet"


# -- userlands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "mirror"),
    [
        (["http://one.example/debian-security", "http://two.example/debian"], "http://two.example/debian"),
        (["http://one.example/ubuntu"], "http://deb.debian.org/debian"),
        ([], "http://deb.debian.org/debian"),
    ],
)
def test_the_mirror_is_the_one_that_apt_uses(sites: Sequence[str], mirror: str) -> None:
    assert mirror_of(sites) == mirror


def test_a_program_of_this_machines_userland_runs_in_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_logged(Here().command("pwd"), tmp_path / "log", "asking", 60) == 0
    assert last_line(tmp_path / "log") == str(CHECKOUT)
    assert (CHECKOUT / "install.sh").exists()


def test_the_files_of_the_checkout_are_those_of_git() -> None:
    names = checkout_files()
    assert {"install.sh", "configs/debian.yaml", "gdb_kprobe/gdbext/load.py"} <= set(names)
    assert not any(name.startswith(".venv/") or "__pycache__" in name for name in names)


def test_a_machine_without_the_tools_of_debian_or_git_has_a_name_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with_git = set(checkout_files())
    monkeypatch.setenv("PATH", "/nowhere")
    assert {name for name in with_git if not name.startswith(".")} <= set(checkout_files())
    assert own_name()
    assert apt_sites() == []


def test_a_chroot_needs_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserlandMissingError, match="needs root"):
        Chroot("trixie", tmp_path / "debian13").prepare()
    assert list(tmp_path.iterdir()) == []


def test_rows_are_shortened() -> None:
    row = Row(CELLS[0], Result.FAILED, "x" * 1000)
    assert len(str(row)) < 400
    assert len(max(markdown([row], {}, "matrix").splitlines(), key=len)) < 400
