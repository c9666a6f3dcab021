"""The documents say what is there: commands, settings, paths, layers, the version."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.launcher.cli import OF_GDB
from gdb_kprobe.launcher.verb import OF_GUESTS
from tests import bench, matrix, reference, torture
from tests.reference import sources

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ROOT / "gdb_kprobe" / "gdbext" / "commands"
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "qemu/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)
INTERNALS = tuple(document for document in DOCUMENTS if document.startswith("docs/internals/"))
NOT_IMPLEMENTED = {"r"}
"""Commands that only refuse: their help has no example."""

_SUFFIXES = (".md", ".py", ".S", ".sh", ".toml", ".yaml", "/")
# Where a path in a document may start.
_BASES = {"qemu/README.md": ("", "qemu/kprobe_guest"), **dict.fromkeys(INTERNALS, ("", "gdb_kprobe"))}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def pyproject() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


def section(document: str, heading: str) -> str:
    """The text under a ``##`` heading of *document*."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", read(document), re.M | re.S)
    assert found is not None, f"{document} has no section {heading!r}"
    return found[1]


def first_cells(text: str) -> list[str]:
    """What stands in backticks at the start of each table row."""
    return re.findall(r"^\| `([^`]+)`", text, re.M)


# -- commands ---------------------------------------------------------------------------------------------------------


def test_readme_is_one_screen() -> None:
    assert 60 < len(read("README.md").splitlines()) <= 100


def test_every_document_is_in_the_list_of_the_readme() -> None:
    """Those of the internals in that of the architecture."""
    linked = {os.path.normpath(ROOT / target) for target in re.findall(r"\]\(([^)#]+)", read("README.md"))}
    internals = ROOT / "docs" / "internals"
    linked |= {
        os.path.normpath(internals / target)
        for target in re.findall(r"\]\(([^)#]+)", read("docs/internals/architecture.md"))
    }
    assert {str(ROOT / document) for document in DOCUMENTS} - {str(ROOT / "README.md")} <= linked


@pytest.mark.parametrize("document", DOCUMENTS)
def test_verbs_of_the_launcher_in_a_document_exist(document: str) -> None:
    used = set(re.findall(r"`(?:.venv/bin/)?gdb-kprobe ([a-z]+)", read(document)))
    assert used <= {*OF_GDB, *OF_GUESTS}, document


def test_the_launchers_page_lists_every_verb() -> None:
    cells = [cell.split() for cell in first_cells(read("docs/reference/launcher.md"))]
    listed = {words[1] for words in cells if words[0] == "gdb-kprobe"}
    assert listed == {*OF_GDB, *OF_GUESTS}


def commands_of_the_installer() -> set[str]:
    """The words that ``install.sh`` takes, from its ``case``."""
    chosen = read("install.sh").rpartition('case "${1:-}" in')[2]
    return set(re.findall(r"(?:^    |\| )([a-z]+)(?= \||\)$)", chosen, re.M))


def test_the_installer_has_its_commands_in_its_help() -> None:
    there = commands_of_the_installer()
    assert {"demo", "test"} | {room.COMMAND.name for room in (bench, matrix, reference, torture)} == there
    helped = read("install.sh").partition("<<'END'")[2].partition("END\n")[0]
    assert set(re.findall(r"^  ([a-z]+)", helped, re.M)) == there


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_the_installer_in_a_document_exist(document: str) -> None:
    used = re.findall(r"(?:`|^ +)\./install\.sh ([a-z]+)(?: ([a-z][\w-]*))?", read(document), re.M)
    assert {command for command, _ in used} <= commands_of_the_installer()
    kinds = {kind.name for kind in torture.KINDS}
    assert {word for command, word in used if command == "torture" and word} <= kinds


def test_the_installers_page_lists_every_command_and_kind_of_torture() -> None:
    cells = [cell.split() for cell in first_cells(read("docs/reference/launcher.md"))]
    assert {
        words[1] for words in cells if words[0] == "./install.sh" and words[1:2] != ["--uninstall"] and words[1:]
    } == (commands_of_the_installer())
    listed = {words[2] for words in cells if words[:2] == ["./install.sh", "torture"]}
    assert listed == {kind.name for kind in torture.KINDS}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_a_document_exist(document: str) -> None:
    used = set(re.findall(r"(?:`|\(gdb\) )kprobe ([a-z]+)\b(?!:?=)", read(document)))
    assert used <= set(sources.commands()), document


@pytest.mark.parametrize(("name", "docstring"), sorted(sources.commands().items()))
def test_help_has_summary_usage_and_example(name: str, docstring: str) -> None:
    lines = docstring.splitlines()
    assert lines[0].endswith("."), "gdb shows the first line in the list of commands"
    assert len(lines[0]) < 90
    assert re.search(rf"^kprobe {name}\b", docstring, re.M), "no usage line"
    if name not in NOT_IMPLEMENTED:
        example = docstring.partition("Example:\n")[2]
        assert re.match(rf" +kprobe {name}\b", example), "no example of the command"


def test_examples_use_only_commands_that_exist() -> None:
    prefix = ast.parse((COMMANDS / "prefix.py").read_text())
    texts = [*sources.commands().values()]
    texts += [ast.get_docstring(node) or "" for node in prefix.body if isinstance(node, ast.ClassDef)]
    used = {word for text in texts for word in re.findall(r"^ +kprobe ([a-z]+)\b", text, re.M)}
    assert used <= set(sources.commands())


# -- paths ------------------------------------------------------------------------------------------------------------


def paths_in(document: str) -> Iterator[str]:
    """Words in backticks that look like a path of this project, and the targets of links."""
    prose = re.sub(r"```.*?```", "", read(document), flags=re.S)
    words = {word for code in re.findall(r"`([^`]+)`", prose) for word in code.split()}
    words |= set(re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose))
    for word in sorted(words):
        path = word.removeprefix("./")
        of_linux = path.startswith("arch/")
        if re.fullmatch(r"\w[\w./-]*", path) and path.endswith(_SUFFIXES) and not of_linux:
            yield path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_a_document_exist(document: str) -> None:
    bases = [ROOT / base for base in _BASES.get(document, ("",))]
    bases.append((ROOT / document).parent)
    placeholders = {"NAME.yaml", "my.yaml"}
    missing = [
        path
        for path in paths_in(document)
        if path not in placeholders and not any((base / path).exists() for base in bases)
    ]
    assert missing == []


def test_the_path_finder_finds_paths() -> None:
    assert {"region/records.py", "qemu/kprobe_guest/"} <= set(paths_in("docs/internals/architecture.md"))
    assert {"docs/guide/installing.md", "CONTRIBUTING.md"} <= set(paths_in("README.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_headings_lead_somewhere(document: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", read(document)):
        path = (ROOT / document).parent / target if target else ROOT / document
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, (target, anchor)


# -- layers, version, profiles ----------------------------------------------------------------------------------------


def test_layers_are_those_of_the_import_contract() -> None:
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert first_cells(section("docs/internals/architecture.md", "Layers")) == layers


def test_layers_are_all_of_the_package() -> None:
    package = ROOT / "gdb_kprobe"
    there = {path.stem for path in package.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"}
    assert set(first_cells(section("docs/internals/architecture.md", "Layers"))) == there - {"__init__"}


def test_changelog_has_the_version() -> None:
    version = pyproject()["project"]["version"]
    assert re.search(rf"^## \[{re.escape(version)}\] - (Unreleased|\d{{4}}-\d\d-\d\d)$", read("CHANGELOG.md"), re.M)


def test_the_profiles_page_lists_every_key_and_no_other() -> None:
    groups: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(read("gdb_kprobe/config/load.py")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]) if name.endswith("_KEYS"):
                groups[name] = ast.literal_eval(node.value)
    keys = {key for key in groups["_PROFILE_KEYS"] if key not in ("kernel", "region", "policy")}
    keys |= {f"kernel.{key}" for key in groups["_KERNEL_KEYS"]} | {f"region.{key}" for key in groups["_REGION_KEYS"]}
    keys |= {f"policy.{key}" for key in groups["_POLICY_KEYS"]}
    assert set(first_cells(read("docs/reference/profiles.md"))) == keys


# -- messages ---------------------------------------------------------------------------------------------------------

_FILLED_IN = re.compile(r"\.\.\.|\b3\.N\b|\bN\b|\bNAME\b|0x|KPROBE_GUEST|\b\d+ MiB\b|\bCPU 0\b")
"""What stands in a message for what differs from one to the other."""
_TELLING = 8
"""Characters of a part that are enough to find it by."""


def strings_of_the_package() -> str:
    """All texts in the sources, those of an f-string in parts; each ends with a newline."""
    found = []
    for path in (ROOT / "gdb_kprobe").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(found)


def test_messages_in_their_page_are_those_of_the_sources() -> None:
    strings = strings_of_the_package()
    rows = [line for line in read("docs/reference/messages.md").splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(messages) > 30
    for message in messages:
        parts = [part.strip(" ;,:") for part in _FILLED_IN.split(message)]
        telling = [part for part in parts if len(part) >= _TELLING]
        assert telling, message
        for part in telling:
            assert part in strings, f"{message!r}: nothing says {part!r}"
