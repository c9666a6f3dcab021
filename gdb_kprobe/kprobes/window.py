"""Which instructions a 5-byte jump may replace: ours (``can_optimize``), and what the kernel's own rules say. Pure.

A window is the fewest whole instructions from the probed one on that hold the jump. One instruction of 5 bytes or more
needs no proof that nothing else enters it. Of several, none but the first may be entered in any way: by a branch, by a
return, by the guest's tables, by an indirect jump.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from gdb_kprobe.kprobes.insn_info import InsnInfo, InsnInfos
from gdb_kprobe.kprobes.kernel_rules import Rules
from gdb_kprobe.kprobes.landing import landing_pad_size
from gdb_kprobe.kprobes.piece import Piece
from gdb_kprobe.kprobes.slots import in_reach, reaches
from gdb_kprobe.linux.branch_targets import References
from gdb_kprobe.model import AddressRange, Reason, Refusal, VirtAddr
from gdb_kprobe.x86.decode import Insn
from gdb_kprobe.x86.families import Unhandled
from gdb_kprobe.x86.shadow import splits_shadow

JUMP_SIZE: Final = 5
_FTRACE_NOP: Final = bytes.fromhex("0f1f440000")
FTRACE_NOP_SIZE: Final = len(_FTRACE_NOP)


@dataclass(frozen=True)
class Function:
    """The text of one symbol, up to the next symbol, and what the guest says of it.

    *addrs* and *infos* are its instructions, as far as it can be decoded; *end* is where the symbol ends. *sites* are
    (address, bytes, reason) of what the guest patches or knows by address, *extable* what may fault, *ftrace* the
    5-byte nop of the guest's ftrace.
    """

    addrs: Sequence[int]
    infos: Sequence[InsnInfo]
    end: int
    sites: Sequence[tuple[int, int, Reason]] = ()
    extable: Collection[int] = ()
    ftrace: int | None = None

    @property
    def range(self) -> AddressRange:
        return AddressRange(VirtAddr(self.addrs[0]) if self.addrs else VirtAddr(self.end), VirtAddr(self.end))

    @property
    def is_whole(self) -> bool:
        """All of it could be decoded."""
        return bool(self.addrs) and self.addrs[-1] + self.infos[-1].length == self.end

    def sites_in(self, start: int, end: int) -> Iterator[tuple[int, Reason]]:
        """The sites that share a byte with *start* to *end*: address and reason, in their order."""
        if not self.sites:
            return iter(())
        return ((site, why) for site, size, why in self.sites if site < end and start < site + size)

    def stable_insn(self, addr: int) -> Insn | None:
        """The instruction at *addr*, of which only the bytes count; ``None`` where it is not known for good.

        That is where the guest may change the text, and where a fault has another way to go on.
        """
        index = bisect_left(self.addrs, addr)
        if index == len(self.addrs) or self.addrs[index] != addr or addr in self.extable:
            return None
        info = self.infos[index]
        return None if any(True for _ in self.sites_in(addr, addr + info.length)) else info.insn

    @cached_property
    def jump_targets(self) -> list[int]:
        """Where its own direct jumps go."""
        pairs = zip(self.addrs, self.infos, strict=True)
        return sorted(
            addr + info.reach
            for addr, info in pairs
            if info.reach is not None and info.insn.encoding.relative and not info.is_call
        )


def make_function(piece: Piece, known: Sequence[tuple[int, InsnInfo]]) -> Function:
    """The function that *piece* is, of which *known* are the instructions up to the first place that is none."""
    code, at = piece.code, 0
    if known:
        addr, info = known[-1]
        at = addr + info.length - piece.addr
    # Zeros behind a module's text are padding, two bytes an instruction.
    end = at if code[at:] == b"\0" else len(code)
    addrs, infos = [addr for addr, _ in known], [info for _, info in known]
    return Function(addrs, infos, piece.addr + end, piece.sites, piece.extable, _ftrace_nop(piece))


def read_up_to(piece: Piece, addr: int, end: VirtAddr, infos: InsnInfos) -> Function:
    """Decode *piece*, of a function that ends at *end*, up to *addr*."""
    found, _ = infos.read(piece.addr, piece.code, min(addr - piece.addr, len(piece.code)))
    addrs, known = [addr for addr, _ in found], [info for _, info in found]
    return Function(addrs, known, end, piece.sites, piece.extable, _ftrace_nop(piece))


def _ftrace_nop(piece: Piece) -> int | None:
    """The nop that ftrace turns into a call, by its looks; also one that is a call now is a nop in *piece*."""
    at = landing_pad_size(piece.code)
    return piece.addr + at if piece.code.startswith(_FTRACE_NOP, at) else None


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes *start* to *end* that a jump may replace, the first five of them.

    *interior* are the instruction boundaries that the jump hides: no CPU and no task may be there when it is written.
    *old_return*, when it is not ``None``, is one of them that a call of the original text returned to; the displaced
    call returns to *end*. *borrowed*: a nop of the guest's ftrace is in it, which must be told.
    """

    start: VirtAddr
    end: VirtAddr
    interior: tuple[VirtAddr, ...] = ()
    old_return: VirtAddr | None = None
    borrowed: bool = False

    @property
    def range(self) -> AddressRange:
        return AddressRange(self.start, self.end)

    @property
    def jump_end(self) -> VirtAddr:
        """The first byte behind the jump."""
        return VirtAddr(self.start + JUMP_SIZE)


def can_optimize(
    function: Function, index: int, references: Callable[[], References | None], area: AddressRange
) -> Window | Refusal:
    """The window of the instruction *index* of *function*, or why it has none.

    That the instruction may be probed at all is not asked here.

    :param references: what goes where in all text, or ``None``; asked only for a window of several instructions.
    :param area: where the detours are, or may be.
    """
    addrs, infos = function.addrs, function.infos
    start = addrs[index]
    jump_end = start + JUMP_SIZE
    at, last = start, index
    over: int | None = None  # where execution leaves the window for good: behind a call, a jump, a return
    returns: int | None = None
    while at < jump_end:
        if last >= len(infos):
            return _no(Reason.WINDOW_OUTSIDE, start, f"{function.end - start} bytes are left of it")
        info = infos[last]
        if returns is not None and not info.is_nop:
            return _no(Reason.WINDOW_CALL, start, f"to {returns:#x}, where {info.insn} is")
        if over is not None and not info.is_fill:
            return _no(Reason.WINDOW_UNREACHED, start, f"{info.insn} at {at:#x}")
        if over is None or returns is not None:
            refusal = _refused(function, info, at, start, area)
            if refusal is not None:
                return refusal
        at += info.length
        last += 1
        if over is None and (info.is_call or info.leaves):
            over = at
            if info.is_call and at < jump_end:
                returns = at
    for site, reason in function.sites_in(start, at):
        return _no(reason, start, f"at {site:#x}")
    if last - index > 1:
        known = references()
        if known is None:
            return _no(Reason.WINDOW_UNKNOWN, start, "one instruction of 5 bytes or more has no such places")
        if known.is_target(start + 1, jump_end):
            return _no(Reason.WINDOW_TARGET, start)
        if known.is_unresolved(function.range):
            return _no(Reason.INDIRECT_JUMP, start)
    shadow = _parted(infos, index, last)
    if shadow is not None:
        return _no(shadow.reason, start, shadow.detail)
    if not in_reach(area, AddressRange(VirtAddr(start), VirtAddr(at))):
        return _no(Reason.OUT_OF_REACH, start)
    return Window(
        VirtAddr(start),
        VirtAddr(at),
        tuple(VirtAddr(addr) for addr in addrs[index + 1 : last]),
        None if returns is None else VirtAddr(returns),
        _has_ftrace_nop(function, start, at),
    )


def _no(reason: Reason, addr: int, detail: str = "") -> Refusal:
    return Refusal(reason, VirtAddr(addr), detail)


def _refused(function: Function, info: InsnInfo, at: int, start: int, area: AddressRange) -> Refusal | None:
    """Why the instruction at *at*, which is to be executed elsewhere, cannot be."""
    if info.refused is not None:
        return _no(info.refused.reason, start, info.refused.detail)
    if at in function.extable:
        return _no(Reason.EX_TABLE, start, f"a fault must be seen at {at:#x}")
    if info.reach is not None and not reaches(area, at + info.reach):
        return _no(Reason.OUT_OF_REACH, start, f"{info.insn} at {at:#x}")
    return None


def _parted(infos: Sequence[InsnInfo], index: int, last: int) -> Unhandled | None:
    """Whether the window's start or end comes between two instructions that belong together."""
    if index and infos[index - 1].masks:
        found = splits_shadow(None, infos[index - 1].insn, infos[index].insn)
        if found is not None:
            return found
    if last < len(infos) and infos[last - 1].masks:
        return splits_shadow(None, infos[last - 1].insn, infos[last].insn)
    return None


def _has_ftrace_nop(function: Function, start: int, end: int) -> bool:
    return function.ftrace is not None and function.ftrace < end and start < function.ftrace + FTRACE_NOP_SIZE


def kernel_optimizes_in(function: Function, references: References, rules: Rules) -> bool:
    """Whether the kernel's own rules let probes of *function* be optimized at all.

    That is the part of ``can_optimize`` (arch/x86/kernel/kprobes/opt.c) that asks of the whole function.
    """
    if function.extable or not function.is_whole:
        return False
    # Later rules know that a kernel with retpolines has no jump tables.
    return rules is Rules.LINUX_6_12 or not references.has_indirect_jump(function.addrs[0], function.end)


def kernel_optimizes(function: Function, index: int) -> bool:
    """What the rest of the kernel's rules says of the instruction *index*; its infos know the rules.

    They are ``can_optimize``, ``copy_optimized_instructions`` and ``arch_prepare_optimized_kprobe`` of
    arch/x86/kernel/kprobes/opt.c; a probe on a nop of ftrace is not optimized there.
    """
    infos, start = function.infos, function.addrs[index]
    if not infos[index].kernel_probes:
        return False
    at, last = start, index
    while at < start + JUMP_SIZE:
        if last >= len(infos) or not infos[last].kernel_can_boost:
            return False
        at += infos[last].length
        last += 1
    if _has_ftrace_nop(function, start, at):
        return False
    if any(why is not Reason.BUG_TABLE for _, why in function.sites_in(start, at)):
        return False
    # The end is inclusive: one byte stricter than it need be.
    targets = function.jump_targets
    found = bisect_right(targets, start)
    return not (found < len(targets) and targets[found] <= start + JUMP_SIZE)
