"""A live patch for the guest: a module that is made without the kernel's headers, of what BTF and kallsyms say."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

from gdb_kprobe.guest.linux import LinuxGuest

NAME = "patched"
NEW = "patched_show"
"""The function that the module has calls go to."""
TEXT = "live patched"
"""What it shows."""
_VERSION_SIZE = 64
_LAYOUT = b"module_layout"


def make_live_patch(
    kernel: LinuxGuest, another: bytes, old: str, directory: Path, *, returns: int | None = None
) -> bytes:
    """A module that live-patches *old* for *kernel*, of which *another* is a module.

    *old* is a seq_file's show function; or, when *returns* is given, any function, which returns this number then.
    """
    source, made = directory / "patch.S", directory / "patch.ko"
    source.write_text(_source(kernel, another, old, _shows(kernel) if returns is None else f"mov eax, {returns}"))
    subprocess.run(["as", "--64", "-o", made, source], check=True)
    return made.read_bytes()


def _shows(kernel: LinuxGuest) -> str:
    """The code of a seq_file's show function that shows :data:`TEXT`."""
    # In newer kernels (6.12) seq_puts() is inline, and calls what it was.
    puts = "seq_puts" if kernel.kallsyms.find("seq_puts") else "__seq_puts"
    return f"""\
        lea rsi, [rip + shown]
        movabs rax, {kernel.kallsyms.address(puts):#x}
        call rax
        xor eax, eax"""


def _source(kernel: LinuxGuest, another: bytes, old: str, code: str) -> str:
    types, address = kernel.types, kernel.kallsyms.address
    vermagic = re.search(rb"vermagic=([^\0]+)", another)
    assert vermagic is not None
    info = ["license=GPL", f"vermagic={vermagic[1].decode()}", f"name={NAME}", "livepatch=Y", "retpoline=Y", "depends="]
    module = _struct(
        types.size_of("module"),
        {
            types.offset_of("module", "name"): f'.asciz "{NAME}"',
            types.offset_of("module", "init"): ".quad init",
            types.offset_of("module", "exit"): ".quad exit",
        },
        {types.offset_of("module", "name"): len(NAME) + 1},
    )
    func = _struct(
        2 * types.size_of("klp_func"),
        {types.offset_of("klp_func", "old_name"): ".quad old", types.offset_of("klp_func", "new_func"): f".quad {NEW}"},
    )
    objects = _struct(2 * types.size_of("klp_object"), {types.offset_of("klp_object", "funcs"): ".quad funcs"})
    patch = _struct(
        types.size_of("klp_patch"),
        {types.offset_of("klp_patch", "mod"): ".quad module", types.offset_of("klp_patch", "objs"): ".quad objects"},
    )
    return f"""
        .intel_syntax noprefix
        .section .modinfo, "a"
        {chr(10).join(f'.asciz "{line}"' for line in info)}
        {_versions(another)}
        .section .gnu.linkonce.this_module, "aw"
        .balign 64                      # the kernel keeps a color in the low bits of addresses within it
        .globl module
module: {module}
        .data
        .balign 8
patch:  {patch}
objects: {objects}
funcs:  {func}
old:    .asciz "{old}"
shown:  .asciz "{TEXT}\\n"
        .text
        .type init, @function
init:   push rbp
        lea rdi, [rip + patch]
        movabs rax, {address("klp_enable_patch"):#x}
        call rax
        pop rbp
        ret
        .size init, . - init
        .type exit, @function
exit:   ret
        .size exit, . - exit
        .type {NEW}, @function
{NEW}:  push rbp
{code}
        pop rbp
        ret
        .size {NEW}, . - {NEW}
        .section .note.GNU-stack, "", @progbits
"""


def _struct(size: int, members: dict[int, str], sizes: dict[int, int] | None = None) -> str:
    """The lines of *size* bytes, zero but for *members* at their offsets, of 8 bytes or as in *sizes*."""
    lines, at = [], 0
    for offset, line in sorted(members.items()):
        lines += [*_zeros(offset - at), line]
        at = offset + (sizes or {}).get(offset, 8)
    return "\n".join([*lines, *_zeros(size - at)])


def _zeros(size: int) -> list[str]:
    return [f".zero {size}"] if size else []


def _versions(another: bytes) -> str:
    """What the kernel checks its modules by, as *another* has it; nothing without CONFIG_MODVERSIONS."""
    at = another.find(_LAYOUT + b"\0") - 8
    if at < 0:
        return ""
    (crc,) = struct.unpack_from("<Q", another, at)
    return f"""\
        .section __versions, "a"
        .quad {crc:#x}
        .asciz "{_LAYOUT.decode()}"
        .zero {_VERSION_SIZE - 8 - len(_LAYOUT) - 1}"""
