"""What a Python handler sees of a hit, and what it may do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Final, TypeVar, overload

from gdb_kprobe.errors import UnmappedError
from gdb_kprobe.language.spec import FetchArg, ProbeSpec
from gdb_kprobe.linux.strings import c_string
from gdb_kprobe.model import GENERAL_REGISTERS, PT_REGS_NAMES, CpuId, VirtAddr
from gdb_kprobe.target.protocols import Cpus

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_WRITABLE = frozenset(GENERAL_REGISTERS)
_NONE: Final = object()
_D = TypeVar("_D")


class Registers(MutableMapping[str, int]):
    """The registers at the probe point, by the kernel's pt_regs name (``di``, ``ip``) or the hardware's (``rdi``).

    Both ``regs["di"]`` and ``regs.di`` work, for reading and writing. Writes reach the vCPU when the handler returns.
    """

    __slots__ = ("_changed", "_values")
    _values: dict[str, int]
    _changed: set[str]

    def __init__(self, values: dict[str, int]) -> None:
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_changed", set())

    def __getitem__(self, name: str) -> int:
        return self._values[_hardware(name)]

    def __setitem__(self, name: str, value: int) -> None:
        hardware = _hardware(name)
        if hardware not in _WRITABLE:
            raise KeyError(f"{name} cannot be written from a handler; these can: {', '.join(GENERAL_REGISTERS)}")
        self._values[hardware] = value & _MASK
        self._changed.add(hardware)

    def __delitem__(self, name: str) -> None:
        raise TypeError("a register cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(PT_REGS_NAMES)

    def __len__(self) -> int:
        return len(PT_REGS_NAMES)

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __setattr__(self, name: str, value: int) -> None:
        try:
            self[name] = value
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __repr__(self) -> str:
        return "Registers(" + ", ".join(f"{name}={self[name]:#x}" for name in self) + ")"

    @property
    def changed(self) -> frozenset[str]:
        """Hardware names of the registers written so far."""
        return frozenset(self._changed)

    @contextlib.contextmanager
    def shown_at(self, ip: VirtAddr) -> Iterator[None]:
        """Have the instruction pointer be *ip*, meanwhile, unless it was written; written as *ip*, it is as it was."""
        real = self._values["rip"]
        if "rip" in self._changed:
            yield
            return
        self._values["rip"] = ip
        try:
            yield
        finally:
            if self._values["rip"] == ip:
                self._values["rip"] = real
                self._changed.discard("rip")

    def save(self) -> tuple[dict[str, int], frozenset[str]]:
        """All values and what was written so far, for :meth:`restore`."""
        return dict(self._values), self.changed

    def restore(self, saved: tuple[dict[str, int], frozenset[str]]) -> None:
        """Forget what was written since :meth:`save`."""
        values, changed = saved
        self._values.update(values)
        self._changed.clear()
        self._changed.update(changed)


def _hardware(name: str) -> str:
    hardware = PT_REGS_NAMES.get(name, name)
    if hardware not in _WRITABLE and hardware not in ("cs", "ss"):
        raise KeyError(f"no register {name!r}; the names are those of struct pt_regs: {', '.join(PT_REGS_NAMES)}")
    return hardware


class Arguments(Mapping[str, int]):
    """What the definition of a probe fetches, by name, as numbers of its types; ``args["dfd"]`` and ``args.dfd``.

    A value is that of its register when it is asked for: a handler that has written the register sees that.
    """

    __slots__ = ("_args", "_regs")

    def __init__(self, args: Sequence[FetchArg], regs: Registers) -> None:
        self._args = {arg.name: arg for arg in args}
        self._regs = regs

    def __getitem__(self, name: str) -> int:
        arg = self._args.get(name)
        if arg is None:
            names = ", ".join(self._args) or "none: a definition fetches them, as 'p:NAME PLACE dfd=%di:s32'"
            raise KeyError(f"no argument {name!r}; there are {names}")
        return arg.type.extract(self._regs[arg.register])

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._args)

    def __len__(self) -> int:
        return len(self._args)

    def __repr__(self) -> str:
        return "Arguments(" + ", ".join(f"{name}={value}" for name, value in self.items()) + ")"


class HitContext:
    """One hit of one probe, as its handler sees it.

    *regs* are the registers at the probe point, before the instruction (pre-handler) or after it (post-handler).
    Changing ``regs.ip`` in a pre-handler skips the instruction: the guest goes on at the new address. *name* is the
    probe's, *hit* counts its hits from 1, *args* are what its definition fetches.

    What reads guest memory takes a *default*: it is returned where the memory is not mapped, as a page is that the
    guest would fault in (the kernel's own events say ``(fault)`` then). Without it that is an error, and one that a
    handler lets out disables its probe.
    """

    def __init__(
        self, probe: ProbeSpec, hit: int, cpu: CpuId, regs: Registers, next_ip: VirtAddr, machine: Cpus
    ) -> None:
        self.name = probe.name
        self.hit = hit
        self.cpu = cpu
        self.regs = regs
        self.args = Arguments(probe.args, regs)
        self.next_ip = next_ip
        self._machine = machine
        self.stop_requested = False

    @overload
    def read(self, addr: int, size: int) -> bytes: ...
    @overload
    def read(self, addr: int, size: int, *, default: _D) -> bytes | _D: ...
    def read(self, addr: int, size: int, *, default: object = _NONE) -> object:
        """Read *size* bytes of the current address space, the user's part included.

        :raises UnmappedError: not mapped now, and there is no *default*.
        """
        data = self._machine.read_current(self.cpu, VirtAddr(addr), size)
        return _or(default, addr) if data is None else data

    def write(self, addr: int, data: bytes) -> None:
        """Write *data* to the current address space, whatever the page's protection is.

        :raises UnmappedError: not mapped now.
        """
        if not self._machine.write_current(self.cpu, VirtAddr(addr), data):
            raise UnmappedError(VirtAddr(addr), "in the address space of the current task")

    @overload
    def read_int(self, addr: int, size: int = 8) -> int: ...
    @overload
    def read_int(self, addr: int, size: int = 8, *, default: _D) -> int | _D: ...
    def read_int(self, addr: int, size: int = 8, *, default: object = _NONE) -> object:
        """Read an unsigned little-endian integer of *size* bytes.

        :raises UnmappedError: not mapped now, and there is no *default*.
        """
        data = self.read(addr, size, default=None)
        return _or(default, addr) if data is None else int.from_bytes(data, "little")

    @overload
    def read_string(self, addr: int, limit: int = 256) -> str: ...
    @overload
    def read_string(self, addr: int, limit: int = 256, *, default: _D) -> str | _D: ...
    def read_string(self, addr: int, limit: int = 256, *, default: object = _NONE) -> object:
        """Read a zero-terminated string of at most *limit* bytes; stops early at an unmapped page.

        What is no printable ASCII is escaped, as ``\\x1b``: the guest may have put anything there. :meth:`read`
        gives the bytes.

        :raises UnmappedError: not even the first byte is mapped, and there is no *default*.
        """
        data = b""
        while len(data) < limit and b"\0" not in data:
            at = addr + len(data)
            count = min(limit - len(data), 0x1000 - (at & 0xFFF), 64)
            more = self.read(at, count, default=None)
            if more is None:
                if not data:
                    return _or(default, addr)
                break
            data += more
        return c_string(data)

    def skip(self) -> None:
        """Do not execute the probed instruction: go on right behind it."""
        self.regs.ip = self.next_ip

    def stop(self) -> None:
        """Stop the machine at the probe point and give the user the prompt."""
        self.stop_requested = True


def _or(default: object, addr: int) -> object:
    if default is _NONE:
        raise UnmappedError(VirtAddr(addr), "in the address space of the current task")
    return default


Handler = Callable[[HitContext], object]
"""A pre- or post-handler. Returning ``True`` is the same as calling :meth:`HitContext.stop`."""

Watch = Callable[[Registers], None]
"""What the session itself does at a hit. No Ctrl-C gets into it; it tells itself what goes wrong."""
