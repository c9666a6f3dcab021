"""A Debian archive of small packages in a directory, for a real apt and dpkg-deb."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

MACHINES = "bookworm"
"""The suite that the machine's apt is set up with."""


class Archive:
    """Packages that apt serves as soon as :meth:`publish` was called.

    *config* is what ``APT_CONFIG`` has to name: nothing of this machine's own package lists is looked at.
    """

    def __init__(self, directory: Path) -> None:
        self._root = directory / "archive"
        self._state = directory / "state"
        for made in (self._root / "pool", self._state / "lists/partial", self._state / "cache/archives/partial"):
            made.mkdir(parents=True)
        (self._state / "status").touch()
        sources = self._state / "sources.list"
        sources.write_text(f"deb [trusted=yes] file:{self._root} {MACHINES} main\n")
        self.config = self._state / "apt.conf"
        self.config.write_text(
            f'Dir::Etc::sourcelist "{sources}";\n'
            'Dir::Etc::sourceparts "/dev/null";\n'
            f'Dir::State "{self._state}";\n'
            f'Dir::State::lists "{self._state}/lists";\n'
            f'Dir::State::status "{self._state}/status";\n'
            f'Dir::Cache "{self._state}/cache";\n'
            'APT::Sandbox::User "root";\n'
            'APT::Architecture "amd64";\n'
            'Acquire::Languages "none";\n'
            # Nothing here is signed.
            'Acquire::AllowInsecureRepositories "true";\n'
            'APT::Get::AllowUnauthenticated "true";\n'
        )
        self._stanzas: dict[str, dict[tuple[str, str], str]] = {MACHINES: {}}

    def add(
        self,
        name: str,
        version: str,
        files: Mapping[str, bytes] | None = None,
        depends: tuple[str, ...] = (),
        suite: str = MACHINES,
    ) -> None:
        """Make a package with *files*, by their path without the first slash; it replaces one of the same version."""
        root = self._root / "pool" / f"{name}_{version}.root"
        shutil.rmtree(root, ignore_errors=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <nobody@localhost>\n"
        if depends:
            control += f"Depends: {', '.join(depends)}\n"
        control += "Description: a package of a test\n"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN" / "control").write_text(control)
        for path, data in (files or {}).items():
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        archive = self._root / "pool" / f"{name}_{version}_amd64.deb"
        subprocess.run(["dpkg-deb", "-b", str(root), str(archive)], check=True, capture_output=True)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        where = f"Filename: pool/{archive.name}\nSize: {archive.stat().st_size}\nSHA256: {digest}\n"
        self._stanzas.setdefault(suite, {})[name, version] = control + where

    def publish(self) -> None:
        """Have the archive serve all that was added, and the machine's apt see its suite."""
        for suite, stanzas in self._stanzas.items():
            lists = self._root / "dists" / suite / "main" / "binary-amd64"
            lists.mkdir(parents=True, exist_ok=True)
            packages = "\n".join(stanzas.values()).encode()
            (lists / "Packages").write_bytes(packages)
            listed = f"{hashlib.sha256(packages).hexdigest()} {len(packages)} main/binary-amd64/Packages"
            (self._root / "dists" / suite / "Release").write_text(
                f"Origin: Debian\nSuite: {suite}\nCodename: {suite}\nComponents: main\nArchitectures: amd64\n"
                f"Date: Mon, 01 Jan 2024 00:00:00 UTC\nSHA256:\n {listed}\n"
            )
        self.apt("update")

    def apt(self, *words: str) -> None:
        subprocess.run(
            ["apt-get", "-q", *words],
            check=True,
            capture_output=True,
            env={"APT_CONFIG": str(self.config), "PATH": "/usr/bin:/bin"},
        )


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """An empty archive that is all that apt knows, and an empty cache of the harness."""
    archive = Archive(tmp_path)
    monkeypatch.setenv("APT_CONFIG", str(archive.config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return archive
