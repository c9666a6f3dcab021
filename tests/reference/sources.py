"""What the sources say of themselves: commands, MI commands, settings, reasons, functions and classes of the API."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "gdb_kprobe"
_COMMANDS = PACKAGE / "gdbext" / "commands"
_SETTINGS = {"_Switch": ("off", "on"), "_Choice": (), "_Text": ("NAME",)}
"""The kinds of settings in ``gdbext/settings.py``, and what each may be set to; a choice names its values itself."""


@dataclass(frozen=True, slots=True)
class Setting:
    """*values*: what it may be set to, the default first."""

    name: str
    doc: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reason:
    """A member of :class:`gdb_kprobe.model.Reason`: *text* is what the user reads."""

    name: str
    text: str
    doc: str


@dataclass(frozen=True, slots=True)
class Function:
    """*signature* is without ``def`` and without the name."""

    name: str
    signature: str
    doc: str


@dataclass(frozen=True, slots=True)
class Class:
    """*attributes*: fields and properties with a docstring, by name; *methods* are those with one."""

    name: str
    doc: str
    attributes: dict[str, str]
    methods: tuple[Function, ...]


def commands() -> dict[str, str]:
    """Docstrings of the ``kprobe`` commands by name: the calls ``Class("name")`` in each module's ``register()``."""
    found: dict[str, str] = {}
    for path in sorted(_COMMANDS.glob("*.py")):
        tree = _tree(path)
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "register":
                for call in ast.walk(node):
                    match call:
                        case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(word))]) if name in classes:
                            found[word] = ast.get_docstring(classes[name]) or ""
    return found


def prefix() -> str:
    """The docstring of ``kprobe`` itself."""
    return _class(_COMMANDS / "prefix.py", "KprobePrefix").doc


def mi_commands() -> dict[str, str]:
    """Docstrings of what answers the MI commands, by their names: the values of the MI module's ``COMMANDS``."""
    tree = _tree(_COMMANDS / "mi.py")
    docs = {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef)}
    (table,) = (
        node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "COMMANDS"
    )
    assert isinstance(table, ast.Dict)
    return {
        f"-kprobe-{ast.literal_eval(key)}": docs[ast.unparse(value)]
        for key, value in zip(table.keys, table.values, strict=True)
        if key is not None
    }


def settings() -> tuple[Setting, ...]:
    """The settings, in the order of their names."""
    return tuple(sorted(_settings(), key=lambda setting: setting.name))


def _settings() -> Iterator[Setting]:
    for node in ast.walk(_tree(PACKAGE / "gdbext" / "settings.py")):
        match node:
            case ast.Call(func=ast.Name(id=kind), args=[name, doc, *rest]) if kind in _SETTINGS:
                values = _SETTINGS[kind]
                match rest:
                    case [ast.Constant(value=True)]:
                        values = ("on", "off")
                    case [ast.Tuple()]:
                        # The rungs of the model, best first, behind what leaves the choice to us.
                        values = ("auto", *reversed([member.text for member in members("Rung")]))
                yield Setting(ast.literal_eval(name), ast.literal_eval(doc), values)


def reasons() -> tuple[Reason, ...]:
    """The members of ``Reason``, in their order."""
    return members("Reason")


def members(enumeration: str) -> tuple[Reason, ...]:
    """The members of an enumeration of :mod:`gdb_kprobe.model`, each with the docstring under it."""
    body = _class_node(PACKAGE / "model.py", enumeration).body
    found = []
    for node, behind in zip(body, [*body[1:], None], strict=True):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                found.append(Reason(name, text, _docstring(behind)))
    return tuple(found)


_API = ("profiles", "waiting", "sessions", "api", "runs", "inspect", "doctor", "symbols", "channel", "signals")
"""The modules of ``gdbext`` whose functions the Python API exports, in the order of the page."""


def api() -> tuple[Function, ...]:
    """The functions of the Python API."""
    exported = _exported()
    functions = [function for name in _API for function in _functions(_tree(PACKAGE / "gdbext" / f"{name}.py").body)]
    return tuple(function for function in functions if function.name in exported)


def _exported() -> set[str]:
    """What ``api.py`` exports."""
    (names,) = (
        ast.literal_eval(node.value)
        for node in _tree(PACKAGE / "gdbext" / "api.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(names)


def exported_classes() -> set[str]:
    """What else ``api.py`` exports: classes, and types."""
    return _exported() - {function.name for function in api()}


def hit_context() -> tuple[Class, ...]:
    """What a handler is given: the hit, its registers, its arguments."""
    path = PACKAGE / "session" / "hit_context.py"
    return tuple(_class(path, name) for name in ("HitContext", "Registers", "Arguments"))


def told_hit() -> Class:
    """What a listener is given."""
    return _class(PACKAGE / "session" / "probes.py", "Hit")


def probe() -> Class:
    """A probe."""
    return _class(PACKAGE / "session" / "probes.py", "Probe")


_ANSWERS = {
    "gdbext/symbols.py": ("LoadedSymbols",),
    "gdbext/until.py": ("Run",),
    "guest/doctor.py": ("Finding",),
    "guest/guest.py": ("Place",),
    "region/definitions.py": ("Definition",),
    "session/probes.py": ("State",),
    "session/session.py": ("Detached",),
    "session/stats.py": ("Reading", "Count"),
}
"""Values that functions of the API answer with, beside those of ``session/inspect.py``."""


def answers() -> tuple[Class, ...]:
    """What the functions that ask answer with."""
    path = PACKAGE / "session" / "inspect.py"
    found = [_class(path, node.name) for node in _tree(path).body if isinstance(node, ast.ClassDef)]
    return (*found, *(_class(PACKAGE / file, name) for file, names in _ANSWERS.items() for name in names))


def errors() -> tuple[Class, ...]:
    """What is raised, in the order of ``errors.py``."""
    path = PACKAGE / "errors.py"
    return tuple(_class(path, node.name) for node in _tree(path).body if isinstance(node, ast.ClassDef))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _class_node(path: Path, name: str) -> ast.ClassDef:
    return next(node for node in _tree(path).body if isinstance(node, ast.ClassDef) and node.name == name)


def _class(path: Path, name: str) -> Class:
    node = _class_node(path, name)
    attributes = {}
    for item, behind in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and _docstring(behind):
            attributes[item.target.id] = _docstring(behind)
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name) and _docstring(behind):
            attributes[item.targets[0].id] = _docstring(behind)
        elif isinstance(item, ast.FunctionDef) and _is_property(item) and ast.get_docstring(item):
            attributes[item.name] = ast.get_docstring(item) or ""
    methods = tuple(method for method in _functions(node.body) if method.doc)
    return Class(name, ast.get_docstring(node) or "", attributes, methods)


def _functions(body: list[ast.stmt]) -> list[Function]:
    return [
        Function(node.name, _signature(node), ast.get_docstring(node) or "")
        for node in body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not _is_property(node)
    ]


def _is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)


def _signature(node: ast.FunctionDef) -> str:
    """The parameters, without ``self``, and what is returned; what stands for no value given is ``...``."""
    parameters = ast.unparse(node.args).removeprefix("self, ").removeprefix("self").replace("_NONE", "...")
    returned = "" if node.returns is None or ast.unparse(node.returns) == "None" else f" -> {ast.unparse(node.returns)}"
    return f"({parameters}){returned}"


def _docstring(node: ast.stmt | None) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return inspect.cleandoc(text).strip()
    return ""
