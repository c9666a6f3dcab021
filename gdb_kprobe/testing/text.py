"""The guest's kernel text before and after: the test that nothing was left behind.

The bytes are read from the file that backs the guest's RAM, not through the plugin's way. What the guest itself may
have changed meanwhile (its jump labels, static calls, ftrace sites) is told apart by its own tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gdb_kprobe.guest.linux import LinuxGuest, open_linux
from gdb_kprobe.linux.arrays import np
from gdb_kprobe.model import AddressRange, Reason, VirtAddr, offset
from gdb_kprobe.target.protocols import Monitor, PhysicalMemory

_GUESTS_OWN = frozenset({Reason.JUMP_LABEL, Reason.STATIC_CALL, Reason.STATIC_CALL_TRAMPOLINE, Reason.ALTERNATIVE})
_FENTRY_NOPS = (bytes.fromhex("0f1f440000"), b"\xe8")


def _where_different(old: bytes, new: bytes) -> list[int]:
    """Indices of the bytes that are not the same; the two are as long as each other."""
    different = np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8)
    return [int(index) for index in np.flatnonzero(different)]


@dataclass(frozen=True, slots=True)
class Difference:
    """One byte of text that is not what it was; *own* is the rule by which the guest may change it, if any."""

    addr: VirtAddr
    before: int
    after: int
    place: str
    own: str

    def __str__(self) -> str:
        return f"{self.place}: {self.before:02x} -> {self.after:02x} ({self.own or 'NOT the guest itself'})"


class TextSnapshot:
    """All live text of a Linux guest, core kernel and modules, at one moment."""

    def __init__(self, monitor: Monitor, memory: PhysicalMemory, known: LinuxGuest | None = None) -> None:
        """*known*: what was found out before of what runs there; it is used if that still does."""
        if known is not None and known.is_same_boot(monitor):
            known.refresh()
            self.guest = known
        else:
            self.guest = open_linux(monitor, memory)
        self._ranges = tuple(self.guest.text_ranges())
        self._texts = {window: self._read(window) for window in self._ranges}

    @property
    def size(self) -> int:
        """Bytes compared."""
        return sum(window.size for window in self._ranges)

    def original(self, addr: VirtAddr, size: int) -> bytes:
        """The text at *addr* as it was then; less than *size* bytes at the end of a range, none outside of all."""
        for window, text in self._texts.items():
            if addr in window:
                return text[addr - window.start :][:size]
        return b""

    def differences(self) -> tuple[Difference, ...]:
        """Compare with the text as it is now, as far as it is there: a module may have come back somewhere else."""
        self.guest.refresh()
        now = frozenset(self.guest.text_ranges())
        return tuple(
            self._difference(VirtAddr(window.start + index), old[index], new[index])
            for window, old in self._texts.items()
            if window in now and (new := self._read(window)) != old
            for index in _where_different(old, new)
        )

    def leftovers(self, touched: Iterable[int] = ()) -> list[str]:
        """The differences that the guest cannot have made itself, or that are at an address of *touched*."""
        ours = set(touched)
        return [str(found) for found in self.differences() if not found.own or found.addr in ours]

    def _read(self, window: AddressRange) -> bytes:
        return self.guest.memory.read(window.start, window.size)

    def _difference(self, addr: VirtAddr, before: int, after: int) -> Difference:
        place = self.guest.place_of(addr)
        refusal = self.guest.refusal_at(place, 1)
        reasons = [] if refusal is None else [refusal.reason]
        # Also in text that is refused for what it is: noinstr functions have jump labels, too.
        reasons += [site.reason for site in self.guest.text_facts().sites_in(AddressRange(addr, offset(addr, 1)))]
        own = next((str(reason) for reason in reasons if reason in _GUESTS_OWN), "")
        if not own:
            for site in self.guest.ftrace_sites(AddressRange(addr, offset(addr, 1))):
                now = self.guest.memory.read(site.ip, site.window.size)
                own = "ftrace site" if any(now.startswith(nop) for nop in _FENTRY_NOPS) and after != 0xCC else ""
        return Difference(addr, before, after, str(place), own)
