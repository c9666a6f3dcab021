"""What a kernel's name means. Nothing is pinned: a name stands for the newest that is served of its kind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kprobe_guest.errors import BuildError
from kprobe_guest.spec import KERNEL_NAMES

_SERIES: Final = re.compile(r"(?:(\d+\.\d+)(?:-(cloud|generic|rt))?|(cloud|generic|rt))(?:@([a-z][a-z-]*))?")
_SUFFIX: Final = {"cloud": "-cloud-amd64", "generic": "-amd64", "rt": "-rt-amd64"}


@dataclass(frozen=True, slots=True)
class Series:
    """Debian's kernels of one version, or of any: ``6.12``, ``6.12-rt``, ``7.3-generic@trixie-backports``, ``rt``.

    *number* is empty for any version; *flavour* is Debian's ``cloud``, ``rt``, or ``generic`` for the one that has no
    name there; *suite* is empty for the first one that serves it.
    """

    number: str = ""
    flavour: str = "cloud"
    suite: str = ""

    def release_of(self, package: str) -> str | None:
        """The release (``uname -r``) of the kernel in an image package of this series; ``None`` for any other."""
        # A generic kernel's name is that of the others without their flavour: 6.1.0-9-amd64, 7.3.4+deb13-amd64.
        match = re.fullmatch(rf"linux-image-(\d+\.\d+\.\d[\w.+~]*(?:-\d+)?{_SUFFIX[self.flavour]})", package)
        if match is None or not match[1].startswith(f"{self.number}." if self.number else ""):
            return None
        return match[1]

    def __str__(self) -> str:
        number = f"{self.number}-" if self.number else ""
        return f"{number}{self.flavour}" + (f"@{self.suite}" if self.suite else "")


def parse_series(name: str) -> Series:
    """The series that *name* means.

    :raises BuildError: it is no such name.
    """
    match = _SERIES.fullmatch(name)
    if match is None:
        raise BuildError(f"there is no kernel called {name!r}; a kernel is {KERNEL_NAMES}")
    return Series(match[1] or "", match[2] or match[3] or "cloud", match[4] or "")
