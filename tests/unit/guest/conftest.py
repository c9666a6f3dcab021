"""A Debian archive of small packages in a directory, for a real apt and dpkg-deb."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest


class Archive:
    """Packages that apt serves as soon as :meth:`publish` was called.

    *config* is what ``APT_CONFIG`` has to name: nothing of this machine's own package lists is looked at.
    """

    def __init__(self, directory: Path) -> None:
        self._pool = directory / "pool"
        self._state = directory / "state"
        for made in (self._pool, self._state / "lists" / "partial", self._state / "cache" / "archives" / "partial"):
            made.mkdir(parents=True)
        (self._state / "status").touch()
        sources = self._state / "sources.list"
        sources.write_text(f"deb [trusted=yes] file:{self._pool} ./\n")
        self.config = self._state / "apt.conf"
        self.config.write_text(
            f'Dir::Etc::sourcelist "{sources}";\n'
            'Dir::Etc::sourceparts "/dev/null";\n'
            f'Dir::State "{self._state}";\n'
            f'Dir::State::lists "{self._state}/lists";\n'
            f'Dir::State::status "{self._state}/status";\n'
            f'Dir::Cache "{self._state}/cache";\n'
            'APT::Sandbox::User "root";\n'
            'Acquire::Languages "none";\n'
        )
        self._stanzas: dict[tuple[str, str], str] = {}

    def add(
        self, name: str, version: str, files: Mapping[str, bytes] | None = None, depends: tuple[str, ...] = ()
    ) -> None:
        """Make a package with *files*, by their path without the first slash; it replaces one of the same version."""
        root = self._pool / f"{name}_{version}.root"
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
        archive = self._pool / f"{name}_{version}_amd64.deb"
        subprocess.run(["dpkg-deb", "-b", str(root), str(archive)], check=True, capture_output=True)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        size = archive.stat().st_size
        self._stanzas[name, version] = f"{control}Filename: ./{archive.name}\nSize: {size}\nSHA256: {digest}\n"

    def publish(self) -> None:
        """Have apt see all that was added."""
        (self._pool / "Packages").write_text("\n".join(self._stanzas.values()))
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
    archive = Archive(tmp_path / "archive")
    monkeypatch.setenv("APT_CONFIG", str(archive.config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return archive
