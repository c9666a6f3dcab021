"""What goes wrong with a guest, as the reader of a test log or a terminal must see it."""

from __future__ import annotations

import re
from pathlib import Path


class GuestError(Exception):
    """Base of all errors of the guest harness; the message says what, where, why and what to do."""


class BuildError(GuestError):
    """A guest's kernel, initramfs or image could not be made."""


class LaunchError(GuestError):
    """QEMU did not start; carries its command line and what it wrote to stderr."""


class GuestFailedError(GuestError):
    """The guest panicked, oopsed, warned, or its QEMU ended unasked."""

    def __init__(self, what: str, console_tail: str, directory: Path) -> None:
        super().__init__(f"guest failed: {what}\n  artefacts: {directory}\n  end of the console:\n{console_tail}")
        self.what = what
        self.console_tail = console_tail
        self.directory = directory

    @property
    def is_of_a_switched_label(self) -> bool:
        """Whether it looks like what QEMU before 8.0 may do to a guest of several vCPUs that switches a jump label.

        A guest does so by itself while it boots (docs/limits.md). It dies of an int3 of its own that is gone, or one
        of its vCPUs takes it for ever.
        """
        said = f"{self.what}\n{self.console_tail}"
        return re.search(r"\bint3: 0000 \[#|detected stall|soft lockup", said) is not None


class GuestTimeoutError(GuestError):
    """The guest is alive as far as one can see, but did not answer in the time given."""


class SilentGuestError(GuestTimeoutError):
    """Nothing at all has come of a command in the guest."""
