"""What a kernel's name means. Nothing is pinned: a name stands for the newest that is served of its kind.

``6.12-rt`` is a kernel of Debian's, ``6.12-nomodules`` one that is built here from Debian's source of that version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kprobe_guest.errors import BuildError
from kprobe_guest.spec import KERNEL_NAMES

_BUILT: Final = re.compile(r"(?:(\d+\.\d+)-)?(nomodules|nobtf)(?:@([a-z][a-z-]*))?")
_SHORT: Final = {"small": "nomodules", "small-nobtf": "nobtf"}
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


@dataclass(frozen=True, slots=True)
class SourceSeries:
    """Small kernels, built here from the Debian source of one version, or of any: ``6.12-nomodules``, ``nobtf``.

    *variant*: ``nomodules`` has neither MODULES nor KPROBES, FTRACE and JUMP_LABEL; ``nobtf`` is the same without the
    types of its structures (BTF). *number* and *suite* are those of a :class:`Series`.
    """

    number: str
    variant: str
    suite: str = ""

    def version_of(self, package: str) -> str | None:
        """The version of the kernel whose source *package* is, if it is one of this series; ``None`` for any other."""
        match = re.fullmatch(r"linux-source-(\d+\.\d+)", package)
        return None if match is None or self.number not in ("", match[1]) else match[1]

    def __str__(self) -> str:
        number = f"{self.number}-" if self.number else ""
        return f"{number}{self.variant}" + (f"@{self.suite}" if self.suite else "")


def names_of(series: SourceSeries) -> list[str]:
    """All names by which a kernel of *series* is asked for."""
    return [str(series), *(name for name, variant in _SHORT.items() if SourceSeries("", variant) == series)]


def parse_name(name: str) -> Series | SourceSeries:
    """The kernels that *name* means.

    :raises BuildError: it is no such name.
    """
    match = _BUILT.fullmatch(_SHORT.get(name, name))
    return parse_series(name) if match is None else SourceSeries(match[1] or "", match[2], match[3] or "")


def parse_series(name: str) -> Series:
    """The series that *name* means.

    :raises BuildError: it is no such name.
    """
    match = _SERIES.fullmatch(name)
    if match is None:
        raise BuildError(f"there is no kernel called {name!r}; a kernel is {KERNEL_NAMES}")
    return Series(match[1] or "", match[2] or match[3] or "cloud", match[4] or "")
