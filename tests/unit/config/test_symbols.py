"""The symbol file of a bare-metal guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from gdb_kprobe.config.symbols import SymbolFile, load_symbols
from gdb_kprobe.errors import ConfigError
from gdb_kprobe.model import AddressRange, VirtAddr


def test_plain_yaml(tmp_path: Path) -> None:
    path = tmp_path / "symbols.yaml"
    path.write_text("image: 0xffffffff80100000\nsymbols: 16\n")
    assert load_symbols(path) == SymbolFile({"image": VirtAddr(0xFFFF_FFFF_8010_0000), "symbols": VirtAddr(16)})


def test_json_with_the_text_range(tmp_path: Path) -> None:
    path = tmp_path / "symbols.json"
    path.write_text('{"symbols": {"a": 4096}, "text": {"address": 4096, "size": 32}, "region": {"address": 1}}')
    assert load_symbols(path) == SymbolFile({"a": VirtAddr(4096)}, AddressRange(VirtAddr(4096), VirtAddr(4128)))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "a symbol file must be a mapping of names to addresses"),
        ("- a\n", 1, "a symbol file must be a mapping of names to addresses"),
        ("a: 1\nb: high\n", 2, "'b' is not an address"),
        ("a: 1\nb: [1]\n", 2, "'b' is not an address"),
        ("a: 1\nb: -1\n", 2, "'b' is not an address"),
        ("a: 1\nb: 0x10000000000000000\n", 2, "'b' is not an address"),
        ("a: 1\na: 2\n", 2, "'a' is there twice"),
        ("? [a]\n: 2\n", 1, "a name must be a word"),
        ("symbols: {}\ntext: {address: 1}\n", 2, "'text' must have 'address' and 'size'"),
        (
            "symbols: {}\ntext: {address: 0xffffffffffffffff, size: 2}\n",
            2,
            "'text' goes beyond the last address: 0xffffffffffffffff and 0x2 bytes more",
        ),
        ("a: 1\n\tb: 2\n", 2, "a tab is used for indentation"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "symbols.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_symbols(path)
    assert caught.value.message == f"{path}:{line}: {message}"
