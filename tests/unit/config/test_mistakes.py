"""Every mistake in a profile is an error that names the file, the line and the reason, and says what to do."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.config.load import load_profile
from gdb_kprobe.errors import ConfigError

GOOD = """\
gdbstub: localhost:1234
kernel:
  kind: linux
region:
  source: reserved
  physical: 0x10000000
  size: 16M
policy:
  rungs: [boosted, single-step]
shared_memory: auto
"""


def mistake(path: Path, text: str | bytes) -> tuple[int, str, str]:
    """Line, message and hint of the error that *text* makes as a profile."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_profile(path, {})
    error = caught.value
    prefix = f"{path}:{error.line}: "
    assert error.path == path
    assert error.message.startswith(prefix)
    return error.line, error.message.removeprefix(prefix), error.hint


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def region(**values: str) -> str:
    return "gdbstub: localhost:1234\nregion:\n" + "".join(f"  {key}: {value}\n" for key, value in values.items())


def bare(**values: str) -> str:
    return region(**values) + "kernel: {kind: bare}\n"


def test_the_profile_that_the_mistakes_are_made_in_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    load_profile(path, {})


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "the profile is empty"),
        ("# only a comment\n", 1, "the profile is empty"),
        ("just words\n", 1, "a profile is a mapping"),
        ("- a\n- b\n", 1, "a profile is a mapping"),
        (changed("kernel:\n", "kernle:\n"), 2, "unknown key 'kernle'"),
        (changed("  size", "  sise"), 7, "unknown key 'sise' in 'region'"),
        (GOOD + "memory: 1\n", 11, "unknown key 'memory'"),
        (GOOD + "<<: {}\n", 11, "unknown key '<<'"),
        (GOOD + "? [a, b]\n: c\n", 11, "a key must be a word"),
        (GOOD + "gdbstub: localhost:1\n", 11, "key 'gdbstub' is there twice"),
        (changed("  size: 16M", "  size: 16M\n  size: 16M"), 8, "key 'region.size' is there twice"),
        (GOOD + "---\ngdbstub: x\n", 11, "there is more than one document"),
        (changed("  size: 16M", "\tsize: 16M"), 7, "a tab is used for indentation"),
        (changed("[boosted, single-step]", "[boosted"), 10, "not YAML: expected ',' or ']', but got ':'"),
        (changed("localhost:1234", "'localhost:1234"), 11, "not YAML: found unexpected end of stream"),
        (changed("  kind: linux", " kind: linux\n  x: y"), 4, "not YAML: mapping values are not allowed here"),
        (changed("linux", "*linux"), 3, "not YAML: found undefined alias 'linux'"),
        (GOOD.encode() + b"# \xff\n", 11, "the file is not UTF-8 text"),
        ("[" * 3000, 1, "not YAML: nested too deeply"),
        ("#" * (1 << 20) + "\n", 1, "the file is larger than 1 MiB"),
    ],
)
def test_not_a_profile(tmp_path: Path, text: str | bytes, line: int, message: str) -> None:
    found_line, found_message, hint = mistake(tmp_path / "bad.yaml", text)
    assert (found_line, found_message) == (line, message)
    assert hint


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (changed("gdbstub: localhost:1234\n", ""), 1, "key 'gdbstub' is missing"),
        ("gdbstub: localhost:1\n", 1, "key 'region' is missing"),
        (changed("  source: reserved\n", ""), 5, "key 'region.source' is missing"),
        (changed("  physical: 0x10000000\n", ""), 5, "key 'region.physical' is missing"),
        (region(source="premapped"), 3, "key 'region.virtual' is missing"),
        (changed("kernel:\n  kind: linux", "kernel: linux"), 2, "'kernel' must be a mapping"),
        (changed("[boosted, single-step]", "boosted"), 9, "'policy.rungs' must be a list"),
        (changed("[boosted, single-step]", "[[boosted]]"), 9, "'policy.rungs' must be a single value"),
        (changed("  size: 16M", "  size: [16M]"), 7, "'region.size' must be a single value"),
        (changed("  size: 16M", "  size: !big 16M"), 7, "'region.size' has the YAML tag !big"),
        (changed("  size: 16M", "  size:"), 7, "'region.size' has no value"),
        (changed("  kind: linux", "  kind: Linux"), 3, "'kernel.kind' cannot be 'Linux'"),
        (changed("  source: reserved", "  source: reserve"), 5, "'region.source' cannot be 'reserve'"),
        (changed("boosted", "boost"), 9, "'policy.rungs' cannot be 'boost'"),
        (changed("boosted", "single-step"), 9, "rung 'single-step' is there twice"),
        (changed("[boosted, single-step]", "[]"), 9, "'policy.rungs' is empty: no probe could be placed"),
        (changed("  rungs:", "  boost: never\n  rungs:"), 9, "'policy.boost' cannot be 'never'"),
        (changed("memory: auto", "memory: yes"), 10, "'shared_memory' cannot be 'yes'"),
        (changed("localhost:1234", "host"), 1, "'gdbstub' is neither host:port nor the path of a socket: 'host'"),
        (changed("localhost:1234", "'1234'"), 1, "'gdbstub' is neither host:port nor the path of a socket: '1234'"),
        (changed("localhost:1234", "localhost:0"), 1, "'gdbstub': there is no port 0"),
        (changed("localhost:1234", "localhost:65536"), 1, "'gdbstub': there is no port 65536"),
        (changed("localhost:1234", "unix:/tmp/gdb"), 1, "'gdbstub' cannot be 'unix:/tmp/gdb'"),
        (
            changed("localhost:1234", "${GUEST}/gdb"),
            1,
            "'gdbstub' uses the environment variable GUEST, which is not set or empty",
        ),
        (changed("localhost:1234", "${GUEST/gdb"), 1, "'gdbstub' has a '${' that is not a variable"),
        (changed("localhost:1234", "~nobody-of-that-name/gdb"), 1,
         "'gdbstub' names an unknown home directory: ~nobody-of-that-name/gdb"),
        (
            changed("  kind: linux", "  symbols: s.json"),
            3,
            "'kernel.symbols' is for bare-metal guests: Linux's are read from the guest",
        ),
        (bare(source="premapped", virtual="0x400000", size="2M").replace("bare}", "bare, vmlinux: x}"), 6,
         "'kernel.vmlinux' is for Linux guests"),
        (bare(source="ivshmem"), 3, "source 'ivshmem' is for Linux guests: it is mapped into Linux's page tables"),
        (region(source="ivshmem", physical="0x10000000"), 4, "'region.physical' is not for source 'ivshmem'"),
        (region(source="borrowed", physical="0x10000000"), 4, "'region.physical' is not for source 'borrowed'"),
        (bare(source="borrowed"), 3, "source 'borrowed' is for Linux guests: it is mapped into Linux's page tables"),
        (region(source="premapped", physical="1M"), 4, "'region.physical' is not for source 'premapped'"),
    ],
)  # fmt: skip
def test_wrong_keys_and_values(tmp_path: Path, text: str, line: int, message: str) -> None:
    found_line, found_message, hint = mistake(tmp_path / "bad.yaml", text)
    assert (found_line, found_message) == (line, message)
    assert hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "is too small: 0"),
        ("1M", "is too small: 1M"),
        ("3M", "is not a multiple of 2 MiB: 3M"),
        ("2097153", "is not a multiple of 2 MiB: 2097153"),
        ("1010M", "is too large: 1010M"),
        ("99999G", "is too large: 99999G"),
        ("16MB", "is not a size: '16MB'"),
        ("16m", "is not a size: '16m'"),
        ("1.5G", "is not a size: '1.5G'"),
        ("-16M", "is not a size: '-16M'"),
        ("true", "is not a size: 'true'"),
        ("020000000", "is not a size: '020000000'"),
        ("16_777_216", "is not a size: '16_777_216'"),
        ("٢M", "is not a size: '٢M'"),
        ("1" * 5000, f"is not a size: '{'1' * 5000}'"),
    ],
)
def test_bad_sizes(tmp_path: Path, text: str, message: str) -> None:
    line, found, hint = mistake(tmp_path / "bad.yaml", region(source="ivshmem", size=text))
    assert (line, found) == (4, f"'region.size' {message}")
    assert hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x10000001", "is not aligned to a page: 0x10000001"),
        ("0", "is in the first MiB, which is the firmware's: 0x0"),
        ("0x10000000000000", "is beyond 52 bits of physical address: 0x10000000000000"),
        ("0xfffffffff0000000", "is beyond 52 bits of physical address: 0xfffffffff0000000"),
        ("high", "is not a size: 'high'"),
    ],
)
def test_bad_physical_addresses(tmp_path: Path, text: str, message: str) -> None:
    line, found, hint = mistake(tmp_path / "bad.yaml", region(source="reserved", physical=text))
    assert (line, found) == (4, f"'region.physical' {message}")
    assert hint


@pytest.mark.parametrize("first", [0xFEC0_0000, 0xFFFF_F000, 0xFEBF_F000, 0xFDC0_1000])
def test_physical_range_that_overlaps_the_platform(tmp_path: Path, first: int) -> None:
    _, found, _ = mistake(tmp_path / "bad.yaml", region(source="reserved", physical=f"{first:#x}"))
    assert found == (
        f"'region.physical': {first:#x}-{first + (16 << 20):#x} overlaps the interrupt controllers and the firmware "
        "at 0xfec00000-0x100000000"
    )


@pytest.mark.parametrize("first", ["0xfdc00000", "0x100000000", "1M", "256M", "4G"])
def test_physical_ranges_beside_the_platform_are_allowed(tmp_path: Path, first: str) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(region(source="reserved", physical=first))
    load_profile(path, {})


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("0xffffffffc8001000", "is not aligned to 2 MiB: 0xffffffffc8001000"),
        ("nowhere", "is not an address: 'nowhere'"),
        ("0x1ffffffffc8000000", "is not an address: '0x1ffffffffc8000000'"),
        ("-0x1000", "is not an address: '-0x1000'"),
    ],
)
def test_bad_virtual_addresses(tmp_path: Path, first: str, message: str) -> None:
    line, found, hint = mistake(tmp_path / "bad.yaml", region(source="ivshmem", virtual=first))
    assert (line, found) == (4, f"'region.virtual' {message}")
    assert hint


OUT_OF_REACH = "is out of s32 reach of the kernel's text"
IMAGE = "overlaps the window of the kernel image, 0xffffffff80000000-0xffffffffc0000000"


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (0x0, OUT_OF_REACH),
        (0xFFFF_8880_0000_0000, OUT_OF_REACH),
        (0xFFFF_FFFF_7F00_0000, OUT_OF_REACH),
        (0xFFFF_FFFF_7F20_0000, IMAGE),
        (0xFFFF_FFFF_8000_0000, IMAGE),
        (0xFFFF_FFFF_BFE0_0000, IMAGE),
        (0xFFFF_FFFF_FE20_0000, "reaches into the fixmap window, from 0xffffffffff000000 on"),
        (0xFFFF_FFFF_FEE0_0000, "reaches into the fixmap window, from 0xffffffffff000000 on"),
        (0xFFFF_FFFF_FF00_0000, "overlaps the fixmap window, from 0xffffffffff000000 on"),
    ],
)
def test_virtual_range_outside_the_module_area(tmp_path: Path, first: int, message: str) -> None:
    _, found, hint = mistake(tmp_path / "bad.yaml", region(source="ivshmem", virtual=f"{first:#x}"))
    assert found == f"'region.virtual': {first:#x}-{first + (16 << 20):#x} {message}"
    assert hint == "choose from 0xffffffffc0000000-0xffffffffff000000, or write auto"


def test_virtual_range_beyond_the_last_address(tmp_path: Path) -> None:
    _, found, _ = mistake(tmp_path / "bad.yaml", region(source="ivshmem", virtual="0xffffffffff200000"))
    assert found == "'region.virtual': 0xffffffffff200000 and 16M more go beyond the last address"


def test_virtual_range_in_the_fixmap_window(tmp_path: Path) -> None:
    _, found, _ = mistake(tmp_path / "bad.yaml", region(source="ivshmem", virtual="0xffffffffff200000", size="2M"))
    assert found == (
        "'region.virtual': 0xffffffffff200000-0xffffffffff400000 overlaps the fixmap window, from 0xffffffffff000000 on"
    )


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("auto", "'region.virtual' cannot be auto"),
        ("0x400800", "'region.virtual' is not aligned to a page: 0x400800"),
        ("0x800000000000", "'region.virtual' is not canonical: 0x800000000000"),
        ("0x7fffffffe000", "'region.virtual' is not canonical: 0x7fffffffe000"),
        ("0xfffffffffffff000", "'region.virtual': 0xfffffffffffff000 and 2M more go beyond the last address"),
    ],
)
def test_bad_premapped_ranges(tmp_path: Path, first: str, message: str) -> None:
    line, found, hint = mistake(tmp_path / "bad.yaml", bare(source="premapped", virtual=first, size="2M"))
    assert (line, found) == (4, message)
    assert hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (changed("kernel:\n", "kernle:\n"), "did you mean 'kernel'?"),
        (changed("boosted", "boost"), "did you mean 'boosted'?"),
        (GOOD + "memory: 1\n", "did you mean 'shared_memory'?"),
        (GOOD + "xyzzy: 1\n", "the keys here are gdbstub, qmp, kernel, region, policy, shared_memory"),
        (GOOD + "gdbstub: localhost:1\n", "first in line 1"),
        (changed("localhost:1234", "${GUEST}/gdb"), "export GUEST=..., or give a default: ${GUEST:-default}"),
        (changed("0x10000000", "0x10000123"), "next below: 0x10000000"),
    ],
)
def test_hints_name_what_to_write(tmp_path: Path, text: str, hint: str) -> None:
    assert mistake(tmp_path / "bad.yaml", text)[2] == hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml:1: the file cannot be read: No such file or directory"):
        load_profile(tmp_path / "none.yaml", {})


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r":1: the file cannot be read: Is a directory"):
        load_profile(tmp_path, {})


def test_a_vmlinux_that_is_not_there(tmp_path: Path) -> None:
    line, found, _ = mistake(tmp_path / "bad.yaml", changed("  kind: linux", "  kind: linux\n  vmlinux: vmlinux"))
    assert (line, found) == (4, f"'kernel.vmlinux': there is no file {tmp_path}/vmlinux")


def test_the_whole_error_as_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(changed("kernel:\n", "kernle:\n"))
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert str(caught.value) == f"{path}:2: unknown key 'kernle'\n  hint: did you mean 'kernel'?"


@given(st.text(max_size=60), st.integers(0, len(GOOD)), st.integers(0, 20))
def test_whatever_is_written_gives_a_profile_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, junk: str, at: int, removed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_text(GOOD[:at] + junk + GOOD[at + removed :], errors="replace")
    with contextlib.suppress(ConfigError):
        load_profile(path, {})
