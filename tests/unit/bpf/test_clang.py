"""Programs that clang compiles from C: decoded, checked, and the same compiled further as interpreted."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection

from gdb_kprobe.bpf.insn import LD_IMM64, LoadKind, Program, decode
from gdb_kprobe.bpf.verifier import BpfRefusedError, check
from gdb_kprobe.linux import pt_regs
from tests.proof.bpf import SURROUNDINGS, compare, context_of, interpret
from tests.proof.emulator import Emulator, random_state

CLANG = next(
    (path for name in ("clang", *(f"clang-{n}" for n in range(22, 12, -1))) if (path := shutil.which(name))), ""
)

pytestmark = pytest.mark.skipif(not CLANG, reason="no clang: apt-get install clang")

EMULATOR = Emulator()
REGION_SIZE = 64

HEADER = (
    "typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long u64;"
    "typedef signed char s8; typedef short s16; typedef int s32; typedef long s64;"
    "struct pt_regs {"
    + "".join(f"u64 {name};" for name in pt_regs.OFFSETS)
    + "};\nextern struct { u64 hits, missed; u32 enable, pad; u64 sum, slots[4]; } region;\n"
)

COUNT = """
int prog(struct pt_regs *ctx) {
    if (!region.enable)
        return 0;
    __sync_fetch_and_add(&region.hits, 1);
    return 0;
}
"""

FILTER = """
int prog(struct pt_regs *ctx) {
    s32 fd = ctx->rdi;
    u8 flags = ctx->rsi;
    if ((fd < 0 && flags & 0x40) || ctx->rdx - ctx->rcx > 4096)
        __sync_fetch_and_add(&region.hits, 1);
    else
        __sync_fetch_and_add(&region.missed, fd);
    return 0;
}
"""

ARITHMETIC = """
int prog(struct pt_regs *ctx) {
    u64 a = ctx->rdi, b = ctx->rsi;
    u32 c = ctx->rdx;
    region.slots[0] = a / b + (a % (c | 1)) * 3;
    region.slots[1] = (s64)a >> (b & 63);
    region.slots[2] = c / (u32)b ^ (c << (a & 31));
    region.slots[3] = __builtin_bswap64(a) - __builtin_bswap32(c);
    region.sum = __sync_lock_test_and_set(&region.hits, a);
    return 0;
}
"""

ON_THE_STACK = """
int prog(struct pt_regs *ctx) {
    volatile u64 words[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        words[i] = ctx->rax * i + (u16)ctx->r11;
    u64 log2 = 0, value = words[3] ^ words[7];
#pragma unroll
    for (int bit = 32; bit; bit >>= 1)
        if (value >> bit) {
            value >>= bit;
            log2 += bit;
        }
    region.slots[2] += log2;
    region.sum = value;
    return 0;
}
"""


def compiled(source: str, tmp_path: Path, cpu: str) -> Program:
    """The function in *source*; references to ``region`` are to region 0."""
    c, o = tmp_path / "prog.c", tmp_path / "prog.o"
    c.write_text(HEADER + source)
    subprocess.run([CLANG, "-target", "bpf", f"-mcpu={cpu}", "-O2", "-c", c, "-o", o], check=True, timeout=60)
    with o.open("rb") as file:
        elf = ELFFile(file)
        text, relocations = elf.get_section_by_name(".text"), elf.get_section_by_name(".rel.text")
        assert text is not None
        assert relocations is None or isinstance(relocations, RelocationSection)
        code = bytearray(text.data())
        for relocation in relocations.iter_relocations() if relocations else ():
            at = relocation["r_offset"]
            assert code[at] == LD_IMM64
            # The addend is where the offset is to be: an offset in the symbol, of the low half.
            code[at + 1] |= LoadKind.REGION << 4
            code[at + 4 : at + 8], code[at + 12 : at + 16] = bytes(4), code[at + 4 : at + 8]
    return decode(bytes(code))


@pytest.mark.parametrize(
    ("source", "cpu"),
    [
        pytest.param(source, cpu, id=f"{name}-{cpu}")
        for name, source in {"count": COUNT, "filter": FILTER, "math": ARITHMETIC, "stack": ON_THE_STACK}.items()
        for cpu in ("v2", "v3")
        if (name, cpu) != ("math", "v2")  # it has no exchange
    ],
)
def test_c(source: str, cpu: str, tmp_path: Path) -> None:
    checked = check(compiled(source, tmp_path, cpu), {0: REGION_SIZE})
    outcomes = set()
    for seed in range(40):
        rng = random.Random(seed)
        state = random_state(rng)
        regions = {0: rng.randbytes(16) + (seed % 2).to_bytes(8, "little") + rng.randbytes(REGION_SIZE - 24)}
        outcomes.add(interpret(checked.program, context_of(state), regions)[1][0] == regions[0])
        for surroundings in SURROUNDINGS:
            assert compare(checked, surroundings, EMULATOR, state, regions).differences == []
    assert False in outcomes


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "for (u64 i = 0; i < ctx->rdi; i++) region.slots[1] += *(volatile u64 *)&region.sum;",
            "jumps go forward only",
        ),
        ("region.slots[ctx->rdi & 3] = 1;", "only constants can be added to it"),
        ("*(volatile u64 *)(ctx->rdi) = 1;", "is a number, not a pointer"),
        ("ctx->rdi = 1;", "the context can only be read"),
    ],
)
def test_what_is_refused(body: str, why: str, tmp_path: Path) -> None:
    program = compiled(f"int prog(struct pt_regs *ctx) {{ {body} return 0; }}", tmp_path, "v3")
    with pytest.raises(BpfRefusedError, match=why):
        check(program, {0: REGION_SIZE})
