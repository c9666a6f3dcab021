"""A YAML file as sections and values that know their line, so that every mistake can be shown where it was made.

The file is composed, not constructed: YAML 1.1 would make a boolean of ``off`` and a number of ``12:30``. What a value
is, the key that it stands under decides; here it is text. ``${NAME}`` and ``${NAME:-default}`` in it are replaced from
the environment.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from gdb_kprobe.errors import ConfigError

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}|(?P<bad>\$\{)", re.ASCII)
_MAX_BYTES = 1 << 20
"""pyyaml takes a second for 100 KB; a file of this size was not meant to be read here."""


@dataclass(frozen=True, slots=True)
class Value:
    """The text under *key*, with variables replaced."""

    path: Path
    key: str
    text: str
    line: int

    def error(self, message: str, hint: str = "") -> ConfigError:
        return ConfigError(self.path, self.line, message, hint)


class Section:
    """A mapping whose keys are all known and there once."""

    def __init__(
        self, path: Path, name: str, node: yaml.Node, keys: Collection[str], environment: Mapping[str, str]
    ) -> None:
        self.path = path
        self.line = node.start_mark.line + 1
        self._name = name
        self._environment = environment
        if not isinstance(node, yaml.MappingNode):
            what = f"'{name}' must be a mapping" if name else "a profile is a mapping"
            raise self.error(what, f"write 'key: value' lines; the keys are {', '.join(keys)}")
        self._entries: dict[str, tuple[yaml.Node, int]] = {}
        for key, value in node.value:
            self._add(key, value, keys)

    def _add(self, key: yaml.Node, value: yaml.Node, keys: Collection[str]) -> None:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(self.path, line, "a key must be a word", f"the keys here are {', '.join(keys)}")
        name = key.value
        if name not in keys:
            near = difflib.get_close_matches(name, keys, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the keys here are {', '.join(keys)}"
            where = f" in '{self._name}'" if self._name else ""
            raise ConfigError(self.path, line, f"unknown key '{name}'{where}", hint)
        if name in self._entries:
            first = self._entries[name][1]
            raise ConfigError(self.path, line, f"key '{self._full(name)}' is there twice", f"first in line {first}")
        self._entries[name] = (value, line)

    def error(self, message: str, hint: str = "") -> ConfigError:
        return ConfigError(self.path, self.line, message, hint)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def section(self, key: str, keys: Collection[str]) -> Section | None:
        """Return the mapping under *key*, whose own keys may be *keys*; None when there is none."""
        if key not in self._entries:
            return None
        return Section(self.path, self._full(key), self._entries[key][0], keys, self._environment)

    def value(self, key: str) -> Value | None:
        """Return the scalar under *key*, None when there is none."""
        if key not in self._entries:
            return None
        return self._scalar(key, *self._entries[key])

    def values(self, key: str) -> list[Value] | None:
        """Return the list of scalars under *key*, None when there is none."""
        if key not in self._entries:
            return None
        node, line = self._entries[key]
        if not isinstance(node, yaml.SequenceNode):
            raise ConfigError(self.path, line, f"'{self._full(key)}' must be a list", f"write {key}: [first, second]")
        return [self._scalar(key, item, item.start_mark.line + 1) for item in node.value]

    def require(self, key: str, hint: str) -> Value:
        """Return the scalar under *key*.

        :raises ConfigError: there is none; *hint* says what to write.
        """
        value = self.value(key)
        if value is None:
            raise self.error(f"key '{self._full(key)}' is missing", hint)
        return value

    def _full(self, key: str) -> str:
        return f"{self._name}.{key}" if self._name else key

    def _scalar(self, key: str, node: yaml.Node, line: int) -> Value:
        name = self._full(key)
        if not isinstance(node, yaml.ScalarNode):
            raise ConfigError(self.path, line, f"'{name}' must be a single value", f"write {key}: VALUE")
        if not node.tag.startswith("tag:yaml.org,2002:"):
            raise ConfigError(self.path, line, f"'{name}' has the YAML tag {node.tag}", "leave the tag out")
        text = self._replace_variables(node.value, name, line).strip()
        if not text:
            raise ConfigError(self.path, line, f"'{name}' has no value", "leave the key out to get its default")
        return Value(self.path, name, text, line)

    def _replace_variables(self, text: str, name: str, line: int) -> str:
        def replacement(found: re.Match[str]) -> str:
            if found["bad"] is not None:
                hint = "write ${NAME} or ${NAME:-default}"
                raise ConfigError(self.path, line, f"'{name}' has a '${{' that is not a variable", hint)
            value = self._environment.get(found["name"], "") or found["default"]
            if value is None:
                hint = f"export {found['name']}=..., or give a default: ${{{found['name']}:-default}}"
                message = f"'{name}' uses the environment variable {found['name']}, which is not set or empty"
                raise ConfigError(self.path, line, message, hint)
            return value

        return _VARIABLE.sub(replacement, text)


def read_document(path: Path, keys: Collection[str], environment: Mapping[str, str]) -> Section:
    """Read the file *path*, whose top-level keys may be *keys*.

    :raises ConfigError: it cannot be read, is not YAML, or is not a mapping of known keys.
    """
    node = compose_file(path)
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        raise ConfigError(path, 1, "the profile is empty", f"its keys are {', '.join(keys)}")
    return Section(path, "", node, keys, environment)


def compose_file(path: Path) -> yaml.Node | None:
    """Return the YAML node that is the whole of the file *path*, None when there is nothing in it.

    :raises ConfigError: it cannot be read, or is not YAML.
    """
    text = _read_text(path)
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise _yaml_error(path, error) from None
    except yaml.YAMLError as error:
        raise ConfigError(path, 1, f"not YAML: {error}", "the file holds a character that text does not have") from None
    except RecursionError:
        raise ConfigError(path, 1, "not YAML: nested too deeply", "check the path") from None


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(path, 1, f"the file cannot be read: {error.strerror}", "check the path") from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError(path, 1, "the file is larger than 1 MiB", "check the path")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(path, line, "the file is not UTF-8 text", "check the path") from None


def _yaml_error(path: Path, error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    problem = error.problem or error.context or "cannot be parsed"
    if r"'\t'" in problem:
        return ConfigError(path, line, "a tab is used for indentation", "YAML indents with spaces")
    if "but found another document" in problem or "expected a single document" in (error.context or ""):
        return ConfigError(path, line, "there is more than one document", "remove the '---'")
    return ConfigError(path, line, f"not YAML: {problem}", "check the indentation, the colons and the quotes")
