"""The pages of docs/reference/ are what the sources say, and what they are made by does it right."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import tests.reference
from gdb_kprobe.language.spec import FetchType
from gdb_kprobe.model import Reason, Rung
from tests.reference import markdown, sources
from tests.reference.pages import DIRECTORY, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_sources_say(name: str) -> None:
    assert (DIRECTORY / name).read_text() == PAGES[name](), "./install.sh reference makes it"


def test_what_has_changed_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tests.reference, "DIRECTORY", tmp_path)
    monkeypatch.setattr(tests.reference, "PAGES", {"new.md": lambda: "new\n", "old.md": lambda: "old\n"})
    (tmp_path / "old.md").write_text("old\n")
    assert tests.reference.run(argparse.Namespace()) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{tmp_path}/new.md: written", f"{tmp_path}/old.md: as it was"]
    assert (tmp_path / "new.md").read_text() == "new\n"


def test_reasons_are_read_as_python_has_them() -> None:
    assert [(reason.name, reason.text) for reason in sources.reasons()] == [(item.name, item.value) for item in Reason]
    assert {rung.text for rung in sources.members("Rung")} == set(Rung)


def test_every_reason_says_the_rule_and_what_to_do() -> None:
    for reason in sources.reasons():
        assert reason.doc.endswith("."), reason.name
        assert 40 < len(reason.doc) < 300, reason.name


def test_every_answer_of_mi_and_function_of_the_api_is_described() -> None:
    assert all(sources.mi_commands().values())
    assert all(function.doc for function in sources.api())
    classes = {found.name for found in sources.hit_context()} | {sources.told_hit().name, sources.probe().name}
    classes |= {found.name for found in sources.answers()}
    assert sources.exported_classes() - classes == {"Handler"}


def test_the_types_of_the_language_are_all_in_its_page() -> None:
    page = (DIRECTORY / "language.md").read_text()
    first_and_last = {kind[0]: (f"`{kind[0]}8`", f"`{kind[0]}64`") for kind in FetchType}
    assert all(first in page and last in page for first, last in first_and_last.values())


def test_help_becomes_markdown() -> None:
    doc = "Do it.\n\nkprobe do [N]\n\nIt is not 'kprobe undo', and <N> of\n2 * 3.\n\nExample:\n  kprobe do 3"
    assert markdown.command("do", doc) == [
        "",
        "## kprobe do",
        "",
        "Do it.",
        "",
        *("```text", "kprobe do [N]", "```"),
        "",
        r"It is not `kprobe undo`, and \<N> of 2 \* 3.",
        "",
        "Example:",
        "",
        *("```text", "kprobe do 3", "```"),
    ]


def test_a_docstring_becomes_markdown() -> None:
    doc = "Take *n* of :class:`~a.b.Thing`, ``None`` at last.\n\n:param n: how many;\n    two lines\n:raises X: never."
    assert markdown.python(doc) == [
        "",
        "Take *n* of `Thing`, `None` at last.",
        "",
        "- `n`: how many; two lines",
        "- raises `X`: never.",
    ]


def test_a_table_has_one_line_for_a_row() -> None:
    assert markdown.row("a|b", "c\n  d") == r"| a\|b | c d |"
