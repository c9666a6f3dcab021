"""The text of a value, as what its key says it is."""

from __future__ import annotations

import difflib
import re
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from gdb_kprobe.config.document import Value

_E = TypeVar("_E", bound=StrEnum)

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}
_SIZE = re.compile(r"(?P<number>0[xX][0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,19})(?: ?(?P<unit>[KMG])(?:iB)?)?", re.ASCII)
_ADDRESS = re.compile(r"0[xX][0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,19}", re.ASCII)
_HOST_PORT = re.compile(r"(?P<host>[A-Za-z0-9_.-]*|\[[0-9a-fA-F:.]+\]):(?P<port>[0-9]{1,5})", re.ASCII)


def as_size(value: Value) -> int:
    """Bytes: ``16M``, ``16 MiB``, ``0x1000000`` or ``16777216``; units are powers of 1024."""
    found = _SIZE.fullmatch(value.text)
    if found is None:
        raise value.error(f"'{value.key}' is not a size: {value.text!r}", "write 16M, 16 MiB, 0x1000000 or 16777216")
    return int(found["number"], 0) << _UNITS[found["unit"] or ""]


def as_address(value: Value) -> int:
    """An address of at most 64 bits."""
    if not _ADDRESS.fullmatch(value.text) or (address := int(value.text, 0)) >> 64:
        hint = "write it in hexadecimal, such as 0xffffffffc8000000"
        raise value.error(f"'{value.key}' is not an address: {value.text!r}", hint)
    return address


def as_choice(value: Value, choices: type[_E]) -> _E:
    """A member of *choices* by its value."""
    if value.text in {member.value for member in choices}:
        return choices(value.text)
    near = difflib.get_close_matches(value.text, list(choices), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(choices)}"
    raise value.error(f"'{value.key}' cannot be {value.text!r}", hint)


def as_path(value: Value) -> Path:
    """A path; ``~`` is the home directory, and a relative one starts at the profile's directory."""
    try:
        path = Path(value.text).expanduser()
    except RuntimeError:
        raise value.error(
            f"'{value.key}' names an unknown home directory: {value.text}", "write the whole path"
        ) from None
    return Path(value.path.absolute().parent, path)


def as_file(value: Value) -> Path:
    """The path of a file that exists."""
    path = as_path(value)
    if not path.is_file():
        raise value.error(
            f"'{value.key}': there is no file {path}", "a relative path starts at the profile's directory"
        )
    return path


def as_endpoint(value: Value) -> str:
    """``host:port``, or the path of a unix socket, made absolute; what gdb's ``target remote`` takes."""
    text = value.text
    if re.match(r"(tcp|unix):", text):
        raise value.error(f"'{value.key}' cannot be {text!r}", f"leave out {text.partition(':')[0]}:")
    if (found := _HOST_PORT.fullmatch(text)) is not None:
        if not 1 <= int(found["port"]) <= 65535:
            raise value.error(f"'{value.key}': there is no port {found['port']}", "ports are 1 to 65535")
        return f"{found['host'] or 'localhost'}:{int(found['port'])}"
    if "/" not in text:
        raise value.error(
            f"'{value.key}' is neither host:port nor the path of a socket: {text!r}",
            "write localhost:1234, or a path with a '/' such as ./gdb",
        )
    return str(as_path(value))
