"""Everything this project raises on purpose: two trees, of what is not done, and of what ends a session.

Each error says what, where, why and what to do next. A broken invariant of ours is an ``assert``, never one of these.
The one place that turns them into text at the prompt is :mod:`gdb_kprobe.gdbext.errors`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gdb_kprobe.model import Refusal, VirtAddr


class ReportedError(Exception):
    """Base of every error that is the user's, the guest's or the connection's, and not our bug."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class KprobeError(ReportedError):
    """Something is not done, and nothing is changed or lost by that: the session goes on."""


class SessionOverError(ReportedError):
    """Nothing more can be done with the guest of a session: code that goes through probes or sites does not go on."""


class ConnectionLostError(SessionOverError):
    """The gdbstub does not answer any more."""


class GuestResetError(SessionOverError):
    """The guest is not the boot that was attached to any more; nothing that is known of it holds."""


class NotAttachedError(KprobeError):
    """gdb is attached to no guest."""


class RefusedError(KprobeError):
    """A probe was asked for where the rules say no."""

    def __init__(self, what: str, refusal: Refusal) -> None:
        super().__init__(f"{what}: {refusal.text}", refusal.hint)
        self.refusal = refusal


class NameTakenError(KprobeError):
    """There is a probe of that name already."""


class TargetError(KprobeError):
    """The gdbstub or the guest's memory did not do what was asked."""


class UnmappedError(TargetError):
    """A virtual address has no translation in the guest's page tables."""

    def __init__(self, addr: VirtAddr, why: str = "") -> None:
        super().__init__(f"{addr:#x} is not mapped in the guest" + (f" ({why})" if why else ""))
        self.addr = addr


class StaleTextError(KprobeError):
    """A place in the guest's text does not hold the bytes that it must hold before we write."""

    def __init__(self, addr: VirtAddr, expected: bytes, found: bytes) -> None:
        super().__init__(
            f"guest text at {addr:#x} holds {found.hex(' ')}, expected {expected.hex(' ')}; nothing was written",
            "the guest has changed its own text, or another debugger has; see 'kprobe list'",
        )
        self.addr = addr
        self.expected = expected
        self.found = found


class GuestStateError(KprobeError):
    """The guest is not in a state in which this can be done (reset, firmware, booting, panicked)."""


class GuestPanickedError(GuestStateError):
    """The guest's kernel has panicked: no waiting changes that."""


class NeedsTypesError(GuestStateError):
    """Something that only the types of the guest's kernel tell was asked of a kernel that has none (no BTF)."""

    def __init__(self, what: str) -> None:
        """*what* cannot be read; the beginning of a sentence."""
        super().__init__(
            f"{what} cannot be read without the types of the guest's kernel, and it has none (no BTF)", NEEDS_TYPES_HINT
        )


NEEDS_TYPES_HINT = (
    "name its vmlinux, which has them: 'kprobe attach --vmlinux FILE', or 'kernel: {vmlinux: FILE}' in the profile; or "
    "build it with CONFIG_DEBUG_INFO_BTF"
)


class RegionError(KprobeError):
    """The reserved region cannot be used as described."""


class SyntaxRefusedError(KprobeError):
    """A probe definition or a condition that the language does not allow; *column* counts from 0."""

    def __init__(self, message: str, text: str, column: int, hint: str = "") -> None:
        super().__init__(f"{message}\n    {text}\n    {' ' * column}^", hint)
        self.text = text
        self.column = column


class ConfigError(KprobeError):
    """A profile is wrong; names the file and the line (counted from 1)."""

    def __init__(self, path: Path | str, line: int, message: str, hint: str = "") -> None:
        super().__init__(f"{path}:{line}: {message}", hint)
        self.path = path
        self.line = line
