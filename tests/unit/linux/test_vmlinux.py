"""Types from a file: BTF as it is, and DWARF by pahole, against what the compiler says of the same structures."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.linux.btf import Btf
from gdb_kprobe.linux.vmlinux import build_id_of, types_of

SOURCE = """
#include <stddef.h>
#include <stdio.h>
struct inner { char c; long l; };
struct outer { int i; struct { short s; struct inner in; }; enum color { RED = 3, BLUE = -7 } color; char text[13]; };
struct outer one;
int main(void)
{
    printf("%zu %zu %zu %zu", sizeof(struct outer), offsetof(struct outer, in.l), offsetof(struct outer, color),
           offsetof(struct outer, text));
    return one.i;
}
"""

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
needs_pahole = pytest.mark.skipif(shutil.which("pahole") is None, reason="pahole is not installed")


def compiled(directory: Path, *options: str) -> tuple[Path, list[int]]:
    """A program, and what it says of its types."""
    path = directory / "program"
    command = ["gcc", *options, "-Wl,--build-id=0x0123456789abcdef", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    said = subprocess.run([str(path)], capture_output=True, text=True, check=True).stdout
    return path, [int(word) for word in said.split()]


def asked(data: bytes) -> list[int]:
    btf = Btf(data)
    assert btf.enum("color") == {"RED": 3, "BLUE": -7}
    members = [btf.member("outer", name) for name in ("in.l", "color", "text")]
    assert members[2].size == 13
    return [btf.size_of("outer"), *(member.offset for member in members)]


@needs_compiler
@needs_pahole
def test_debug_info_is_read_by_pahole(tmp_path: Path) -> None:
    path, said = compiled(tmp_path, "-g")
    assert asked(types_of(path)) == said


@needs_compiler
@needs_pahole
def test_a_file_with_btf_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = compiled(tmp_path, "-g")
    (tmp_path / "btf").write_bytes(types_of(path))
    plain = tmp_path / "plain"
    add = f".BTF={tmp_path / 'btf'}"
    subprocess.run(["objcopy", "--strip-debug", "--add-section", add, str(path), str(plain)], check=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert asked(types_of(plain)) == said


@needs_compiler
@needs_pahole
def test_a_file_of_debug_info_alone_is_read_by_that(tmp_path: Path) -> None:
    """It has the headers of all other sections, BTF too, and not what they hold."""
    path, said = compiled(tmp_path, "-g")
    (tmp_path / "btf").write_bytes(types_of(path))
    add = f".BTF={tmp_path / 'btf'}"
    both, debug = tmp_path / "both", tmp_path / "debug"
    subprocess.run(["objcopy", "--add-section", add, "--set-section-flags", ".BTF=alloc", path, both], check=True)
    subprocess.run(["objcopy", "--only-keep-debug", both, debug], check=True)
    assert asked(types_of(debug)) == said
    stripped = tmp_path / "stripped"
    subprocess.run(["objcopy", "--strip-debug", "--remove-section", ".BTF", both, stripped], check=True)
    with pytest.raises(KprobeError, match=r"has no types, neither .BTF nor .debug_info"):
        types_of(stripped)


@needs_compiler
def test_a_ctrl_c_that_is_held_back_ends_pahole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_dwarf, _ = compiled(tmp_path, "-g")
    (tmp_path / "pahole").write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 600\n")
    (tmp_path / "pahole").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    held = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        # To this thread: the process has others, of pytest's, which do not hold the signal back.
        threading.Timer(0.5, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        with pytest.raises(KprobeError, match="pahole was interrupted"):
            types_of(with_dwarf)
        assert signal.sigwait({signal.SIGINT}) == signal.SIGINT
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@needs_compiler
def test_without_types_or_pahole_it_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, _ = compiled(tmp_path)
    with pytest.raises(KprobeError, match=r"has no types, neither .BTF nor .debug_info\n.*CONFIG_DEBUG_INFO"):
        types_of(bare)
    other = tmp_path / "other"
    other.mkdir()
    with_dwarf, _ = compiled(other, "-g")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KprobeError, match=r"pahole is not installed\n.*apt-get install"):
        types_of(with_dwarf)


@pytest.mark.parametrize("ask", [types_of, build_id_of])
def test_a_file_that_is_no_vmlinux_is_told(tmp_path: Path, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(KprobeError, match=r"cannot read .*No such file"):
        ask(tmp_path / "none")
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"MZ" + bytes(100))
    with pytest.raises(KprobeError, match="is no ELF file"):
        ask(path)
