"""Dead flags and registers: the table against iced, the answers against unicorn, the walk by listings."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import or_

import iced_x86
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gdb_kprobe.model import VirtAddr
from gdb_kprobe.x86.decode import DecodeError, Insn, decode, iter_insns
from gdb_kprobe.x86.effects import REGISTERS, STATUS_FLAGS, Effect, Flag, effect_of, register_bit
from gdb_kprobe.x86.encoding import EncodingError, parse
from gdb_kprobe.x86.families import Family
from gdb_kprobe.x86.liveness import MOST_INSNS, InsnAt, are_flags_dead, dead_flags, dead_registers
from tests.proof.cases import CASES
from tests.proof.emulator import Emulator, has_meaning, is_extended, random_state
from tests.proof.operands import make_sensible
from tests.proof.state import differences

ADDR = VirtAddr(0xFFFF_FFFF_8123_4567)
NONE = Flag(0)
ALL_BUT_AF = STATUS_FLAGS & ~Flag.AF
ALL_BUT_CF = STATUS_FLAGS & ~Flag.CF
RESULT = Flag.SF | Flag.ZF | Flag.PF


def text(listing: str) -> InsnAt:
    """The instructions of a listing of hexadecimal, which stands at ADDR and ends there."""
    return at(iter_insns(bytes.fromhex(listing), ADDR))


def at(insns: Iterable[Insn]) -> InsnAt:
    """Those of *insns* by their address."""
    found: dict[int, Insn] = {insn.addr: insn for insn in insns}

    def insn_at(addr: int) -> Insn | None:
        return found.get(addr)

    return insn_at


# The table


@pytest.mark.parametrize(
    ("listing", "dead"),
    [
        ("01 d8", STATUS_FLAGS),  # add eax, ebx
        ("48 83 ec 18", STATUS_FLAGS),  # sub rsp, 0x18
        ("83 f8 01", STATUS_FLAGS),  # cmp eax, 1
        ("48 83 7f 08 00", STATUS_FLAGS),  # cmp qword ptr [rdi+8], 0: it may fault
        ("48 f7 d8", STATUS_FLAGS),  # neg rax
        ("f0 48 0f c1 07", STATUS_FLAGS),  # lock xadd [rdi], rax
        ("f0 0f b1 17", STATUS_FLAGS),  # lock cmpxchg [rdi], edx
        ("f3 48 0f b8 c3", STATUS_FLAGS),  # popcnt rax, rbx
        ("9d", STATUS_FLAGS),  # popfq
        ("a7", STATUS_FLAGS),  # cmpsd
        ("f3 a7", NONE),  # repe cmpsd: the count may be zero
        ("f2 ae", NONE),  # repne scasb
        ("f3 a4", NONE),  # rep movsb
        ("11 d8", ALL_BUT_CF),  # adc eax, ebx
        ("19 c0", ALL_BUT_CF),  # sbb eax, eax
        ("31 c0", ALL_BUT_AF),  # xor eax, eax
        ("85 c0", ALL_BUT_AF),  # test eax, eax
        ("f6 47 08 01", ALL_BUT_AF),  # test byte ptr [rdi+8], 1
        ("ff c0", ALL_BUT_CF),  # inc eax
        ("f0 ff 0f", ALL_BUT_CF),  # lock dec dword ptr [rdi]
        ("48 0f af c3", Flag.CF | Flag.OF),  # imul rax, rbx
        ("f7 f3", NONE),  # div ebx: all undefined
        ("0f a3 c8", Flag.CF),  # bt eax, ecx
        ("f0 48 0f ba 2f 07", Flag.CF),  # lock bts qword ptr [rdi], 7
        ("0f bc c3", Flag.ZF),  # bsf eax, ebx
        ("f3 0f bc c3", Flag.ZF),  # tzcnt, or bsf
        ("c1 e0 04", RESULT | Flag.CF),  # shl eax, 4
        ("d1 f8", RESULT | Flag.CF | Flag.OF),  # sar eax, 1
        ("c1 e0 01", RESULT | Flag.CF | Flag.OF),  # shl eax, 1
        ("c1 e0 20", NONE),  # shl eax, 32: by nothing
        ("48 c1 e0 20", RESULT | Flag.CF),  # shl rax, 32
        ("c0 e0 09", RESULT),  # shl al, 9: CF is undefined
        ("c0 f8 09", RESULT | Flag.CF),  # sar al, 9
        ("d3 e0", NONE),  # shl eax, cl: by nothing, perhaps
        ("c1 c0 05", Flag.CF),  # rol eax, 5
        ("d1 c0", Flag.CF | Flag.OF),  # rol eax, 1
        ("d1 d0", Flag.OF),  # rcl eax, 1
        ("48 0f a4 d8 05", RESULT | Flag.CF),  # shld rax, rbx, 5
        ("66 0f a4 d8 11", NONE),  # shld ax, bx, 17
        ("9e", ALL_BUT_CF & ~Flag.OF | Flag.CF),  # sahf
        ("f8", Flag.CF),  # clc
        ("0f 44 c3", NONE),  # cmove eax, ebx
        ("8d 47 01", NONE),  # lea eax, [rdi+1]
        ("fc", NONE),  # cld: not a status flag
        ("0f 01 ca", NONE),  # clac
    ],
)
def test_one_instruction(listing: str, dead: Flag) -> None:
    assert dead_flags(ADDR, text(listing)) == dead


def of_iced(bits: int) -> Flag:
    names = ("CF", "PF", "AF", "ZF", "SF", "OF")
    return reduce(or_, (Flag[name] for name in names if bits & getattr(iced_x86.RflagsBits, name)), NONE)


NUMBERS = {getattr(iced_x86.Register, name.upper()): number for number, name in enumerate(REGISTERS)}
RSP = register_bit(4)
INFO = iced_x86.InstructionInfoFactory()
ACCESS = iced_x86.OpAccess
READING = (ACCESS.READ, ACCESS.COND_READ, ACCESS.READ_WRITE, ACCESS.READ_COND_WRITE)


def registers_of(insn: iced_x86.Instruction) -> tuple[int, int]:
    """Masks of what iced says is read, and of what it says is written whole and whatever happens."""
    reads = writes = 0
    for used in INFO.info(insn).used_registers():
        number = NUMBERS.get(iced_x86.RegisterExt.full_register(used.register))
        if number is not None and used.access in READING:
            reads |= register_bit(number)
        elif number is not None and used.access == ACCESS.WRITE and used.register in NUMBERS:
            writes |= register_bit(number)
    return reads, writes


def is_known(effect: Effect) -> bool:
    return effect.falls_through or effect.reach is not None


def check_by_iced(raw: bytes, effect: Effect) -> bool:
    """Compare; false where iced takes *raw* for no instruction. It shall take a lock prefix that makes a fault."""
    insn = iced_x86.Decoder(64, raw, iced_x86.DecoderOptions.NO_INVALID_CHECK, ip=0).decode()
    if insn.code == iced_x86.Code.INVALID or insn.len != len(raw):
        return False
    shown = f"{insn} [{raw.hex(' ')}]"
    written = of_iced(insn.rflags_written | insn.rflags_cleared | insn.rflags_set)
    undefined = of_iced(insn.rflags_undefined)
    mask = int(STATUS_FLAGS)
    assert of_iced(insn.rflags_read) & ~effect.reads == NONE, shown
    assert effect.overwrites & mask & ~written == 0, shown
    assert effect.overwrites_in_fact & ~effect.overwrites & ~(Flag.AF & undefined) == 0, shown
    reads, writes = registers_of(insn)
    assert reads & ~effect.reads & ~RSP == 0, shown  # nobody asks for it
    assert effect.overwrites & ~mask & ~(writes | effect.reads) == 0, shown
    assert insn.flow_control in (
        iced_x86.FlowControl.NEXT,
        iced_x86.FlowControl.CONDITIONAL_BRANCH,
        iced_x86.FlowControl.UNCONDITIONAL_BRANCH,
    ), shown
    assert effect.falls_through == (insn.flow_control != iced_x86.FlowControl.UNCONDITIONAL_BRANCH), shown
    if insn.flow_control == iced_x86.FlowControl.NEXT:
        assert effect.reach is None, shown
    else:
        assert effect.reach is not None, shown
        assert effect.reach & (1 << 64) - 1 == insn.near_branch_target, shown
    return True


PREFIXES = ("", "66", "48", "41", "44", "4d", "40", "6648", "f0", "f2", "f3", "67", "f348")
MODRM = [
    mod << 6 | reg << 3 | rm for mod in range(4) for reg in range(8) for rm in range(8) if mod == 3 or rm in (1, 4, 5)
]
IMMEDIATES = {(0, 0xC0), (0, 0xC1), (1, 0xA4), (1, 0xAC)}
COUNTS = (0, 1, 5, 8, 0x11, 0x20, 0x21)


def every_form() -> Iterator[bytes]:
    """Each opcode of both maps, with each ModRM that may matter, and the counts of shifts."""
    for prefix in map(bytes.fromhex, PREFIXES):
        for opcode_map, opcode in ((m, o) for m in (0, 1) for o in range(256)):
            start = prefix + b"\x0f" * opcode_map + bytes((opcode,))
            for modrm in MODRM:
                sib = b"\x8a" if modrm < 0xC0 and modrm & 7 == 4 else b""
                for fill in COUNTS if (opcode_map, opcode) in IMMEDIATES else (7,):
                    code = start + bytes((modrm,)) + sib + bytes((fill,)) * 9
                    try:
                        encoding = parse(code)
                    except EncodingError:
                        continue
                    yield code[: encoding.length]
                if has_no_modrm(start):
                    break


def has_no_modrm(start: bytes) -> bool:
    try:
        return parse(start + bytes(12)).modrm is None
    except EncodingError:
        return False


def test_table_is_as_iced_says() -> None:
    compared: Counter[str] = Counter()
    for raw in every_form():
        effect = effect_of(raw)
        if is_known(effect):
            compared["compared" if check_by_iced(raw, effect) else "no instruction"] += 1
    assert compared["compared"] > 100_000
    assert compared["no instruction"] < compared["compared"] // 10


@settings(max_examples=3000, deadline=None, derandomize=True)
@given(st.binary(min_size=15, max_size=15))
@example(bytes.fromhex("48c0e020") + bytes(11))  # of a byte, by what REX.W makes of the count
@example(bytes.fromhex("f00200") + bytes(12))  # lock add al, [rax]: no processor executes it
def test_bytes_are_as_iced_says(code: bytes) -> None:
    try:
        raw = decode(code, ADDR).raw
    except DecodeError:
        return
    effect = effect_of(raw)
    if is_known(effect):
        assert check_by_iced(raw, effect)


@pytest.mark.parametrize(
    "unknown",
    [
        "e8 00 00 00 00",  # call
        "ff d0",  # call rax
        "ff e0",  # jmp rax
        "c3",  # ret
        "48 cf",  # iretq
        "0f 05",  # syscall
        "0f 07",  # sysret
        "cc",  # int3
        "cd 80",  # int 0x80
        "0f 0b",  # ud2
        "f4",  # hlt
        "9c",  # pushfq
        "9f",  # lahf
        "0f 01 c1",  # vmcall
        "0f 38 f0 07",  # movbe
        "66 0f 38 17 c1",  # ptest
        "c4 e2 78 f2 c1",  # andn
        "db f1",  # fcomi
        "66 0f ae f0",  # umonitor, not mfence
        "66 0f c3 07",  # no movnti
        "f3 0f ae e8",  # incssp, not lfence
        "f3 0f 1e c8",  # rdssp, not a nop
        "d6",  # salc is none in 64-bit mode
    ],
)
def test_what_is_not_in_the_table_leaves_all_live(unknown: str) -> None:
    code = bytes.fromhex(unknown)
    try:
        first: Insn | None = decode(code, ADDR)
    except DecodeError:
        first = None
    behind = ADDR + len(code)
    insns = {ADDR: first, behind: decode(bytes.fromhex("01d8"), VirtAddr(behind))}
    assert dead_flags(ADDR, insns.get, as_processors_do=True) == NONE
    assert dead_registers(ADDR, insns.get) == frozenset()


# The walk


@pytest.mark.parametrize(
    ("listing", "dead"),
    [
        ("0f 1f 44 00 00 55 48 89 e5 48 83 ec 10", STATUS_FLAGS),  # nop; push; mov; sub
        ("85 c0 01 d8", STATUS_FLAGS),  # test; add: AF too
        ("0f 94 c0 01 d8", ALL_BUT_AF & ~Flag.ZF | Flag.AF),  # sete; add
        ("ff c0 11 d8", ALL_BUT_CF),  # inc; adc
        ("ff c0 01 d8", STATUS_FLAGS),
        ("74 02 01 d8 29 d8", STATUS_FLAGS & ~Flag.ZF),  # je over the add; both ways come to the sub
        ("74 02 01 d8 90", NONE),  # what is behind the nop is not known
        ("eb 02 0f 0b 01 d8", STATUS_FLAGS),  # jmp over a ud2
        ("eb 7f 01 d8", NONE),  # out of what was decoded
        ("01 d8 75 fc", STATUS_FLAGS),
        ("90 75 fd 01 d8", STATUS_FLAGS & ~Flag.ZF),  # a loop that reads ZF each time
        ("90 e2 fd 01 d8", STATUS_FLAGS),  # a loop that reads none
        ("eb fe", STATUS_FLAGS),  # for ever
        ("72 02 01 d8 0f 92 c0 90", NONE),  # one way reads CF, and nothing is known behind it
        ("e3 02 01 d8 0f 92 c0 01 d8", STATUS_FLAGS & ~Flag.CF),  # jrcxz: one way reads CF
        ("66 eb 00 01 d8", NONE),
    ],
)
def test_ways_are_followed(listing: str, dead: Flag) -> None:
    code = bytes.fromhex(listing)
    insns: dict[int, Insn] = {}
    at = 0
    while at < len(code):
        try:
            insn = decode(code[at:], VirtAddr(ADDR + at))
        except DecodeError:
            break
        insns[insn.addr] = insn
        at += insn.length
    assert dead_flags(ADDR, insns.get) == dead
    assert are_flags_dead(ADDR, insns.get) == (dead == STATUS_FLAGS)


def test_af_is_dead_before_logic_as_processors_do() -> None:
    insn_at = text("85 c0")
    assert not are_flags_dead(ADDR, insn_at)
    assert are_flags_dead(ADDR, insn_at, as_processors_do=True)


def test_no_more_instructions_are_looked_at_than_allowed() -> None:
    def nops(count: int) -> InsnAt:
        return text("90 " * count + "01 d8")

    assert are_flags_dead(ADDR, nops(MOST_INSNS - 1))
    assert dead_flags(ADDR, nops(MOST_INSNS)) == NONE
    assert are_flags_dead(ADDR, nops(2), most=3)
    assert dead_flags(ADDR, nops(2), most=2) == NONE
    asked: list[int] = []
    insn_at = text("90 " * 100)

    def noted(addr: int) -> Insn | None:
        asked.append(addr)
        return insn_at(addr)

    assert dead_registers(ADDR, noted, most=7) == frozenset()
    assert asked == [ADDR + number for number in range(7)]


def test_instructions_may_be_decoded_for_another_address() -> None:
    """As the forms that a survey shares are."""
    codes = {ADDR: "eb 02", ADDR + 4: "01 d8"}
    insns = {addr: decode(bytes.fromhex(code), VirtAddr(0)) for addr, code in codes.items()}
    assert are_flags_dead(ADDR, insns.get)


@pytest.mark.parametrize(
    ("listing", "dead"),
    [
        ("31 c0", {"rax"}),
        ("4d 31 c9", {"r9"}),
        ("66 31 c0", set()),
        ("31 c3", set()),  # xor ebx, eax
        ("45 31 c8", set()),  # xor r8d, r9d
        ("41 31 c0", set()),  # xor r8d, eax
        ("b8 01 00 00 00", {"rax"}),
        ("66 b8 01 00", set()),
        ("b0 01 89 c3", {"rbx"}),  # mov al; mov ebx, eax
        ("b0 01 31 c0", {"rax"}),  # the rest of it is lost as well
        ("b4 01", set()),  # mov ah
        ("48 8b 07 48 89 c7", {"rax"}),  # mov rax, [rdi]; mov rdi, rax
        ("48 8b 1c 8a 31 c9 31 d2", {"rbx"}),  # mov rbx, [rdx+rcx*4]
        ("4a 8b 1c 22 45 31 e4 31 d2", {"rbx"}),  # mov rbx, [rdx+r12]
        ("48 8b 05 00 00 00 00", {"rax"}),  # mov rax, [rip]
        ("48 8b 1c 25 00 00 00 00 31 ed 31 e4", {"rbx"}),  # mov rbx, [0]; rbp and rsp are asked of nobody
        ("0f b6 c4", set()),  # movzx eax, ah
        ("40 0f b6 c4", {"rax"}),  # movzx eax, spl
        ("0f 44 c3", set()),  # cmove eax, ebx
        ("99", {"rdx"}),  # cdq
        ("f7 e3", {"rdx"}),  # mul ebx
        ("f6 e3", set()),  # mul bl: into ax
        ("0f 31", {"rax", "rdx"}),  # rdtsc
        ("74 02 31 c9 31 c0", {"rax"}),  # je over the xor
        ("8f c0", {"rax"}),  # pop rax
    ],
)
def test_dead_registers(listing: str, dead: set[str]) -> None:
    assert dead_registers(ADDR, text(listing)) == dead


# The answers

POOL = [
    insn
    for family in (Family.PLAIN, Family.NOP, Family.REPEATED, Family.PUSH_FLAGS)
    for code in CASES[family]
    if has_meaning(insn := decode(bytes.fromhex(code), ADDR)) and not is_extended(insn) and "rsp" not in insn.op_str
]
SEQUENCES = 4000


def random_code(rng: random.Random) -> bytes:
    """A few instructions that move about registers and flags, with branches forward among them."""
    pieces = [random_insn(rng) for _ in range(rng.randrange(2, 9))]
    for index in range(len(pieces) - 1, 0, -1):
        if not rng.randrange(4):
            over = sum(map(len, pieces[index : index + rng.randrange(3)]))
            pieces.insert(index, bytes((rng.choice((0xEB, 0x70 | rng.randrange(16))), over)))
    return b"".join(pieces)


def random_insn(rng: random.Random) -> bytes:
    if not rng.randrange(3):
        return rng.choice(POOL).raw
    while True:
        start = rng.choice((b"", b"", b"\x66", b"\x48", b"\x41", b"\x4d")) + rng.choice((b"", b"", b"\x0f"))
        code = start + bytes((rng.randrange(256), 0xC0 | rng.randrange(64))) + rng.randbytes(8)
        try:
            insn = decode(code, ADDR)
        except DecodeError:
            continue
        if insn.is_branch or not is_known(effect_of(insn.raw)) or not has_meaning(insn) or is_extended(insn):
            continue
        return insn.raw


def test_what_is_dead_makes_no_difference(machine: Emulator) -> None:
    """Two runs from states that differ only in what is dead, and in all of it, end in the same state."""
    rng = random.Random(20261123)
    told: Counter[str] = Counter()
    for _ in range(SEQUENCES):
        code = random_code(rng)
        insns = list(iter_insns(code, ADDR))
        insn_at = at(insns)
        as_processors_do = bool(rng.randrange(2))
        flags = dead_flags(ADDR, insn_at, as_processors_do=as_processors_do)
        registers = dead_registers(ADDR, insn_at)
        if not flags and not registers:
            continue
        before = random_state(rng)
        before.registers["rip"] = ADDR
        for insn in reversed(insns):
            make_sensible(insn, before, rng)
        other = before.copy()
        other.registers["eflags"] ^= flags
        for name in registers:
            other.registers[name] ^= rng.getrandbits(64) | 1
        first = machine.run(before, {ADDR: code}, ADDR, most=100)
        if first.fault or ADDR <= first.registers["rip"] < ADDR + len(code):
            told["not run to the end"] += 1
            continue
        second = machine.run(other, {ADDR: code}, ADDR, most=100)
        assert not differences(first, second), ([str(insn) for insn in insns], flags, registers)
        told["all flags"] += flags == STATUS_FLAGS
        told["some flags"] += flags not in (NONE, STATUS_FLAGS)
        told["registers"] += bool(registers)
    assert told["all flags"] > SEQUENCES // 20
    assert told["some flags"] > SEQUENCES // 5
    assert told["registers"] > SEQUENCES // 5
    assert told["not run to the end"] < SEQUENCES // 10
