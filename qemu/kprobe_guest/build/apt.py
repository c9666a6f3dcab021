"""What apt serves: names, versions, what a package depends on, and the packages themselves. Nothing is installed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kprobe_guest.build.cache import run_tool
from kprobe_guest.errors import BuildError


@dataclass(frozen=True, slots=True)
class Apt:
    """apt as this machine is set up, or with *options* of one's own (``-c FILE``)."""

    options: tuple[str, ...] = ()

    def names(self, prefix: str) -> list[str]:
        """Names of the packages that begin with *prefix*, also of those that are only mentioned somewhere.

        :raises BuildError: apt is missing, or fails.
        """
        return self._cache("pkgnames", prefix).split()

    def candidates(self, packages: Iterable[str]) -> dict[str, str]:
        """The version that apt would fetch of each of *packages*; those that are only mentioned somewhere are left out.

        :raises BuildError: apt is missing, or fails.
        """
        asked = list(packages)
        if not asked:
            return {}
        found = re.findall(r"^(\S+):\n  Installed: .*\n  Candidate: (\S+)$", self._cache("policy", *asked), re.M)
        return {name: version for name, version in found if version != "(none)"}

    def depends(self, package: str) -> list[str]:
        """Names of what *package* depends on; nothing, if the package lists have no such package.

        :raises BuildError: apt is missing, or fails.
        """
        # Asked for a package that it does not have apt-cache fails; showpkg says nothing and is content.
        if not self._cache("showpkg", package).strip():
            return []
        lines = self._cache("depends", package).splitlines()
        return [name.strip("<>") for line in lines if (name := line.partition(" Depends: ")[2])]

    def update(self) -> None:
        """Fetch the package lists; only where *options* keep them somewhere else.

        :raises BuildError: apt cannot.
        """
        assert self.options, "the machine's own lists are not ours to fetch"
        # A suite that is called by what it is now may be another one than the last time.
        words = ["-q", *self.options, *_as_who_we_are(), "-o", "APT::Update::Error-Mode=any", "update"]
        run_tool(["apt-get", *words, "--allow-releaseinfo-change"], package="apt")

    def download(self, package: str, directory: Path) -> Path:
        """Fetch *package* into *directory*; returns its file.

        :raises BuildError: apt cannot.
        """
        before = set(directory.glob("*.deb"))
        command = ["apt-get", "-q", *self.options, *_as_who_we_are(), "download", package]
        try:
            run_tool(command, package="apt", cwd=directory)
        except BuildError as error:
            raise BuildError(f"{error}\n(no network, or old package lists? run: sudo apt-get update)") from error
        [archive] = set(directory.glob("*.deb")) - before
        return archive

    def _cache(self, *words: str) -> str:
        return run_tool(["apt-cache", *self.options, *words], package="apt")


def compare_versions(left: str, right: str) -> int:
    """Order of two versions by dpkg's rules (6.12.9 before 6.12.10, ~ before nothing): negative, 0 or positive."""
    if left == right:
        return 0
    return -1 if subprocess.run(["dpkg", "--compare-versions", left, "lt", right], check=False).returncode == 0 else 1


def _as_who_we_are() -> tuple[str, str]:
    """Root's apt drops to a user that cannot write where we want it to, and says so at length."""
    user = "root" if os.geteuid() == 0 else str(os.environ.get("USER", "nobody"))
    return "-o", f"APT::Sandbox::User={user}"
