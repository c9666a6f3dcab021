"""The pages: which there are, and how each is put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.reference import markdown, sources

DIRECTORY = Path(__file__).resolve().parents[2] / "docs" / "reference"
_MADE = "<!-- Made by ./install.sh reference from the docstrings of the sources: change those. -->"
_SHORT_FORMS = ("p", "r")
_PROBE = ("name", "enabled", "strategy", "place", "hits", "missed", "last_error")
"""What a script may look at of a probe; the rest is the session's own."""


def commands() -> str:
    """Each command as gdb's help has it."""
    docs = sources.commands()
    named = sorted(set(docs) - set(_SHORT_FORMS))
    table = [
        markdown.row(f"[`kprobe {name}`](#kprobe-{name})", markdown.prose(docs[name].splitlines()[0]))
        for name in [*named, *_SHORT_FORMS]
    ]
    entries = [line for name in [*named, *_SHORT_FORMS] for line in markdown.command(name, docs[name])]
    return _page(
        "Commands",
        "What `help kprobe COMMAND` shows. TAB completes options and their values, profiles and paths, functions, "
        "registers, types, and names of probes. `kprobe -:NAME` is the same as `kprobe delete NAME`.",
        ["| command | |", "|---|---|", *table, *entries],
    )


def settings() -> str:
    """The settings, and the commands of MI."""
    rows = [
        markdown.row(f"`set kprobe {setting.name}`", _values(setting.values), markdown.prose(setting.doc))
        for setting in sources.settings()
    ]
    twins = [markdown.row(f"`{name}`", " ".join(doc.split())) for name, doc in sources.mi_commands().items()]
    return _page(
        "Settings and MI",
        "`show kprobe` shows the settings as they are now.",
        [
            "| setting | values, the default first | |",
            "|---|---|---|",
            *rows,
            "",
            "## MI",
            "",
            *markdown.filled(
                "For programs there are twins of the commands that answer with data. They take the options of the "
                "commands. All values are strings, as everywhere in GDB/MI; a yes is `1`. An error is `^error`, with "
                "the same text that the command shows. [Tests of a guest](../guide/guest-tests.md) has an example."
            ),
            "",
            "| command | answers with |",
            "|---|---|",
            *twins,
            "",
            *markdown.filled(
                "A probe is a dictionary: `name`, `definition`, `addr` (where it is) and `asked` (the address that was "
                "named), `bytes` (how many are replaced), `place`, `state` (`pending`, `armed`, `disabled`, `gone`), "
                "`rung`, `family` and `insn` of the instruction, `hits`, `missed`, `saved` (a kprobe of the guest's "
                "own has saved its jump), `redirected` (where the calls go instead), and `error`, its handler's last."
            ),
        ],
    )


def _values(values: Sequence[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def python() -> str:
    """The Python API."""
    hit, *of_hit = sources.hit_context()
    return _page(
        "Python API",
        "`from gdb_kprobe.gdbext import api as kprobe` in a script that gdb runs. "
        "[Python handlers](../guide/python.md) has examples.",
        [
            "",
            "## Functions",
            *(line for function in sources.api() for line in _function(function)),
            "",
            "## What a handler is given",
            *_class(hit),
            *(line for part in of_hit for line in _class(part, methods=False)),
            "",
            "## What a listener of `on_hit` is given",
            *_class(sources.told_hit()),
            "",
            "## What `add` returns",
            *_class(sources.probe(), only=_PROBE, methods=False),
            "",
            "## What is told of a session",
            *(line for part in sources.answers() for line in _class(part)),
            "",
            "## Errors",
            "",
            *(line for error in sources.errors() for line in _attribute(error.name, error.doc)),
        ],
    )


def _function(function: sources.Function, owner: str = "") -> list[str]:
    heading = f"{owner}.{function.name}" if owner else function.name
    return ["", f"### {heading}", "", "```python", f"{function.name}{function.signature}", "```",
            *markdown.python(function.doc)]  # fmt: skip


def _class(found: sources.Class, *, only: Iterable[str] | None = None, methods: bool = True) -> list[str]:
    lines = ["", f"### {found.name}", *markdown.python(found.doc)]
    attributes = {name: found.attributes.get(name, "") for name in found.attributes if only is None or name in only}
    if attributes:
        lines += ["", *(line for name, doc in attributes.items() for line in _attribute(name, doc))]
    if methods:
        lines += [line for method in found.methods for line in _function(method, found.name)]
    return lines


def _attribute(name: str, doc: str) -> list[str]:
    first, *fields = (line for line in markdown.python(doc) if line)
    said = " ".join(line.strip().removeprefix("- ") for line in (first, *fields))
    return markdown.filled(f"`{name}`: {said}", first="- ", rest="  ")


def reasons() -> str:
    """The rules by which a probe, or a better rung of one, is refused."""
    rows = [
        markdown.row(f"`{reason.text}`", f"`{reason.name}`", reason.doc.replace("<", "\\<"))
        for reason in sources.reasons()
    ]
    return _page(
        "Reasons",
        "Why a probe is refused (`cannot probe ...`), or a better rung of one (`not optimized` in `kprobe plan`). The "
        "name is the key in `kprobe check --all --json FILE`. Other messages: [Messages](messages.md).",
        ["| reason | name | the rule, and what to do |", "|---|---|---|", *rows],
    )


def _page(title: str, introduction: str, lines: Iterable[str]) -> str:
    text = "\n".join([f"# {title}", "", _MADE, "", *markdown.filled(introduction), "", *lines])
    return text.replace("\n\n\n", "\n\n") + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "settings-and-mi.md": settings,
    "python-api.md": python,
    "reasons.md": reasons,
}
"""What makes each file of :data:`DIRECTORY` that is made."""
