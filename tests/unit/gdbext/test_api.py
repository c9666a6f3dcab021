"""The Python API is whole, and nobody goes past it. (It imports gdb: here its source is read.)"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
API = ROOT / "gdb_kprobe" / "gdbext" / "api.py"
PARTS = [
    API.with_name(f"{name}.py") for name in ("profiles", "waiting", "sessions", "runs", "inspect", "doctor", "symbols")
]
COMMANDS = API.parent / "commands"


def public_functions(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return {node.name: node for node in functions if not node.name.startswith("_")}


def exported() -> list[str]:
    (value,) = [
        node.value
        for node in ast.parse(API.read_text()).body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    found: list[str] = ast.literal_eval(value)
    return found


def test_all_that_can_be_done_and_asked_is_exported() -> None:
    names = exported()
    assert len(set(names)) == len(names)
    functions = {name for path in (API, *PARTS) for name in public_functions(path)}
    assert functions - set(names) == {"chosen"}, "what only other parts of the API use"


@pytest.mark.parametrize("path", [API, *PARTS], ids=lambda path: path.stem)
def test_each_function_says_what_it_is_and_gives(path: Path) -> None:
    for name, node in public_functions(path).items():
        assert ast.get_docstring(node), name
        assert node.returns is not None, name


def test_text_for_gdb_reaches_behind_the_api_in_one_place_only() -> None:
    """What tests and tools have gdb execute is a string, which no import contract sees."""
    allowed = {ROOT / "tests" / "support" / "inside.py", Path(__file__)}
    behind = (
        "the_plugin()",
        "gdbext import plugin",
        "gdbext.plugin",
        "gdbext import link",
        "gdbext.link",
        ".need_link()",
    )
    found = {
        f"{path.relative_to(ROOT)}: {text}"
        for room in ("tests", "gdb_kprobe/launcher", "gdb_kprobe/testing", "qemu")
        for path in (ROOT / room).rglob("*.py")
        if path not in allowed
        for text in behind
        if text in path.read_text()
    }
    assert found == set()


@pytest.mark.parametrize("path", sorted(COMMANDS.glob("*.py")), ids=lambda path: path.stem)
def test_a_command_goes_through_the_api(path: Path) -> None:
    """An import contract sees modules; what is reached through an object of the API's it does not see."""
    behind = {"the_plugin", "need_link", "link", "session", "stopped"}
    found = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert found & behind == set()
