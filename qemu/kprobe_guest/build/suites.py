"""Package lists of Debian suites that this machine's apt does not look at; kept beside its own, which do not change."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Final

from kprobe_guest.build.apt import Apt
from kprobe_guest.build.cache import cache_directory, progress, run_tool
from kprobe_guest.errors import BuildError

SUITES: Final = ("stable-backports", "stable", "oldstable-backports", "oldstable", "unstable")
"""Where a series is looked for that this machine's own lists do not have: by what they are now, not by their name."""

_HELPER: Final = "/usr/lib/apt/apt-helper"
_KEYRINGS: Final = tuple(Path(f"/usr/share/keyrings/debian-archive-keyring.{suffix}") for suffix in ("gpg", "pgp"))


def suite_apt(suite: str) -> Apt:
    """An apt that knows *suite* alone, with the lists of today: from the archive that this machine has Debian from.

    :raises BuildError: there is no such archive, or it does not serve that suite.
    """
    archive = _archive(suite)
    suite = _codename(archive, suite)
    directory = cache_directory() / "apt" / suite
    for made in ("lists/partial", "cache/archives/partial"):
        (directory / made).mkdir(parents=True, exist_ok=True)
    (directory / "status").touch()
    keyring = next((path for path in _KEYRINGS if path.exists()), None)
    signed = f"[signed-by={keyring}] " if keyring else ""
    (directory / "sources.list").write_text(f"deb {signed}{archive} {suite} main\n")
    config = directory / "apt.conf"
    # What this machine wants done after an update concerns its own lists.
    config.write_text(
        "#clear APT::Update::Post-Invoke-Success;\n#clear APT::Update::Post-Invoke;\n"
        f'Dir::Etc::sourcelist "{directory}/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
        f'Dir::State::lists "{directory}/lists";\nDir::State::status "{directory}/status";\n'
        f'Dir::Cache "{directory}/cache";\nDir::Cache::pkgcache "pkgcache.bin";\nDir::Cache::srcpkgcache "";\n'
        'Acquire::Languages "none";\n'
    )
    apt = Apt(("-c", str(config)))
    progress(f"asking for the packages of Debian's {suite}")
    apt.update()
    return apt


def _codename(archive: str, suite: str) -> str:
    """The name that *suite* has for good: trixie for what is ``stable`` now.

    There are mirrors whose ``stable`` is older than their ``trixie``.
    """
    with tempfile.TemporaryDirectory(prefix="gdb-kprobe-suite-") as directory:
        file = Path(directory) / "InRelease"
        try:
            run_tool([_HELPER, "download-file", f"{archive}/dists/{suite}/InRelease", str(file)], package="apt")
        except BuildError:
            return suite  # the caller that needs it says what is wrong
        found = re.search(r"^Codename: ([a-z][a-z-]*)$", file.read_text(errors="replace"), re.M)
    return found[1] if found else suite


def _archive(suite: str) -> str:
    """The address of the archive that serves *suite*, by what this machine's apt is set up with."""
    # The sources are files of two formats, in several places; apt says what it made of them.
    form = "$(REPO_URI) $(RELEASE) $(ORIGIN) $(COMPONENT)"
    lines = run_tool(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], package="apt").splitlines()
    security = suite.endswith("-security")
    for line in lines:
        address, release, origin, component = line.split(" ")[:4]
        if origin == "Debian" and component == "main" and release.endswith("-security") == security:
            return address.rstrip("/")
    raise BuildError(
        f"this machine's apt has no archive of Debian's that may serve {suite}; a kernel of another distribution is"
        " given by the path of its vmlinuz"
    )
