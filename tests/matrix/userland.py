"""Userlands to run cells in: this machine's own, and other releases of Debian in chroots that are made once and kept.

A chroot is what a new user's machine is: a minimal Debian, this checkout, and what ``./install.sh`` installs. Programs
run in it in name spaces of their own (unshare(1)): what is mounted there, and what a program leaves running, ends with
the program.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gdb_kprobe.errors import KprobeError
from tests.matrix.processes import last_line, run_logged

CHECKOUT = Path(__file__).resolve().parents[2]
_MIRROR = "http://deb.debian.org/debian"
_INSTALL_TIMEOUT = 3600.0
_KEPT_FOR = 30 * 86400
"""Seconds after which a chroot is made anew: its package lists name packages that a mirror has no more."""
_HOME = "/root/gdb_kprobe"
"""The checkout, in a chroot."""

_ENTER = """
root=$1; shift
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sys "$root/sys"
mount --bind /dev "$root/dev"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount --bind "$root/dev/pts/ptmx" "$root/dev/ptmx"
mount -t tmpfs -o size=90% shm "$root/dev/shm"
exec chroot "$root" /usr/bin/env --ignore-environment --chdir=/root/gdb_kprobe "$@"
"""
"""What a shell in new name spaces does: the guests' memory is in the chroot's own /dev/shm."""

_ENVIRONMENT = (
    "HOME=/root",
    "LANG=C.UTF-8",
    "TERM=dumb",
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "DEBIAN_FRONTEND=noninteractive",
    "PIP_CERT=/etc/ssl/certs/ca-certificates.crt",
)
_PASSED_ON = re.compile(r"(https?|ftp|no)_proxy|PIP_(EXTRA_)?INDEX_URL|PIP_TRUSTED_HOST", re.I)
"""Variables that say how a package index is reached from here."""


class UserlandMissingError(KprobeError):
    """A userland cannot be had on this machine: its cells are skipped."""


class Userland(Protocol):
    """Where the programs of a cell run."""

    def reserved(self) -> contextlib.AbstractContextManager[None]:
        """Have no other run of the matrix use it meanwhile; waits for one that does."""

    def prepare(self) -> None:
        """Install everything, unless it is installed.

        :raises UserlandMissingError: that cannot be done on this machine.
        :raises KprobeError: it failed.
        """

    def command(self, *words: str) -> list[str]:
        """Return the command that runs *words* there, in the checkout."""

    def program(self, name: str) -> str:
        """Return the path of a program of the virtual environment, as it is there."""


@dataclass(frozen=True, slots=True)
class Here:
    """This machine's own userland: set up already, for this runs in it."""

    def reserved(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare(self) -> None:
        """Do nothing."""

    def command(self, *words: str) -> list[str]:
        return ["env", "-C", str(CHECKOUT), *words]

    def program(self, name: str) -> str:
        return str(Path(sys.executable).parent / name)


@dataclass(frozen=True, slots=True)
class Chroot:
    """Debian's *suite* in the directory *kept*; *backports*: with QEMU and gdb of the suite's backports."""

    suite: str
    kept: Path
    backports: bool = False

    @property
    def root(self) -> Path:
        return self.kept / "root"

    @property
    def log(self) -> Path:
        """What the installation wrote."""
        return self.kept / "install.log"

    def command(self, *words: str) -> list[str]:
        passed = [f"{name}={value}" for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)]
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        # SIGINT as at a terminal: gdb and the tests use it, and a background job of a script would ignore it.
        enter = ["env", "--default-signal=INT", "sh", "-ec", _ENTER, "enter", str(self.root)]
        return [*namespaces, *enter, *_ENVIRONMENT, *passed, *words]

    def program(self, name: str) -> str:
        return f"{_HOME}/.venv/bin/{name}"

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        self.kept.mkdir(parents=True, exist_ok=True)
        with (self.kept / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{self.kept.name}: waiting for another run", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def prepare(self) -> None:
        self._need_tools()
        self.log.unlink(missing_ok=True)
        made = self.kept / "made"
        if not made.exists() or made.stat().st_mtime < time.time() - _KEPT_FOR:
            made.unlink(missing_ok=True)
            self._make()
            made.touch()
        self._copy_checkout()
        try:
            self._run(self.command("./install.sh"), "./install.sh")
        except BaseException:
            made.unlink()  # what is half installed may stand in the way of the next try
            raise

    def _need_tools(self) -> None:
        if os.geteuid() != 0:
            raise UserlandMissingError("needs root, for a chroot")
        if shutil.which("debootstrap") is None:
            raise UserlandMissingError("debootstrap is not installed", "sudo apt-get install debootstrap")
        tried = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "proc", "proc", "/proc"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if tried.returncode:
            raise UserlandMissingError(f"nothing may be mounted here: {tried.stderr.strip()}")

    def _make(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        mirror, script = mirror_of(apt_sites()), Path("/usr/share/debootstrap/scripts") / self.suite
        # A release that is younger than this debootstrap is made as sid is.
        script = script if script.exists() else script.with_name("sid")
        self._run(
            ["debootstrap", "--variant=minbase", "--include=ca-certificates", self.suite, str(self.root), mirror,
             str(script)],
            f"debootstrap {self.suite}",
        )  # fmt: skip
        etc = self.root / "etc"
        for name in ("resolv.conf", "hosts", "pip.conf"):
            if Path("/etc", name).exists():
                shutil.copyfile(Path("/etc", name), etc / name)
        own = self.root / "usr/local/share/ca-certificates"
        for certificate in Path("/usr/local/share/ca-certificates").glob("*.crt"):
            shutil.copyfile(certificate, own / certificate.name)
        # A mirror may be a copy of a day long ago: Debian's lists of testing and sid are valid for a week only.
        (etc / "apt/apt.conf.d/99mirror").write_text(
            'Acquire::Check-Valid-Until "false";\nAcquire::Check-Date "false";\n'
        )
        (self.root / _HOME[1:]).mkdir()
        self._run(self.command("update-ca-certificates"), "update-ca-certificates")
        if self.backports:
            suite = f"{self.suite}-backports"
            (etc / "apt/sources.list.d/backports.list").write_text(f"deb {mirror} {suite} main\n")
            self._run(self.command("apt-get", "update"), "apt-get update")
            install = ("apt-get", "install", "-y", "--no-install-recommends", "-t", suite, "gdb", "qemu-system-x86")
            self._run(self.command(*install), f"apt-get install -t {suite}")

    def _copy_checkout(self) -> None:
        """Have the files of this checkout there, as they are now; its virtual environment stays."""
        home = self.root / _HOME[1:]
        home.mkdir(exist_ok=True)
        for path in home.iterdir():
            if path.name == ".venv":
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in checkout_files():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, home / name, follow_symlinks=False)

    def _run(self, command: Sequence[str], what: str) -> None:
        status = run_logged(command, self.log, f"{self.kept.name}: {what}", _INSTALL_TIMEOUT)
        if status:
            raise KprobeError(f"{what} failed ({status}): {last_line(self.log)}", f"its output is in {self.log}")


def checkout_files() -> list[str]:
    """Return the names of the checkout's files: what git knows or would add; without git, all that is not hidden."""
    listed = _said("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed:
        return [name for name in listed.split("\0") if name and (CHECKOUT / name).exists()]
    names = (path.relative_to(CHECKOUT) for path in CHECKOUT.rglob("*") if path.is_file())
    return [
        str(name) for name in names if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    ]


def own_name() -> str:
    """Return the name of this machine's userland: ``debian12``, ``debian13-backports``, ``ubuntu24.04``, ``sid``."""
    release = platform.freedesktop_os_release()
    if release["ID"] == "debian" and "VERSION_ID" not in release:
        return "sid"
    name = f"{release['ID']}{release.get('VERSION_ID', '')}"
    qemu = _said("dpkg-query", "-W", "-f", "${Version}", "qemu-system-x86")
    return f"{name}-backports" if "~bpo" in qemu else name


def apt_sites() -> list[str]:
    """Return the addresses of the archives that apt uses here."""
    return list(dict.fromkeys(_said("apt-get", "indextargets", "--format", "$(SITE)", "Identifier: Packages").split()))


def mirror_of(sites: Sequence[str]) -> str:
    """Return the first of *sites* that is an archive of Debian's releases; Debian's own when there is none."""
    return next((site for site in sites if re.search(r"/debian/?$", site)), _MIRROR)


def _said(*command: str) -> str:
    """What *command* says in the checkout; nothing if it fails, or is not installed."""
    try:
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
