"""What a user of the plugin gets: the built wheel, installed outside of the checkout, and the line for ``~/.gdbinit``.

The environment is made as docs/guide/installing.md says, with what pip fetches by itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from gdb_kprobe.testing import GdbMi
from kprobe_guest import GuestSpec
from tests.support.calls import GETPRIORITY
from tests.support.probed import Boot

pytestmark = pytest.mark.live

CHECKOUT = Path(__file__).resolve().parents[2]
_TIMEOUT = 600


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it, in a *directory* that is also the user's home."""

    directory: Path

    @property
    def programs(self) -> Path:
        return self.directory / "environment" / "bin"

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program as a user who knows no checkout."""
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}  # fmt: skip
        done = subprocess.run(
            command, cwd=self.directory, env={**environment, "HOME": str(self.directory)}, check=False,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done

    def gdbinit(self) -> str:
        return self.run(self.programs / "gdb-kprobe", "gdbinit").stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, built from this checkout and installed without extras."""
    made = Installed(tmp_path_factory.mktemp("installed"))
    pip = ("-m", "pip", "--disable-pip-version-check")
    made.run(sys.executable, *pip, "wheel", "-q", "--no-deps", "--wheel-dir", made.directory, CHECKOUT)
    made.run(sys.executable, "-m", "venv", made.directory / "environment")
    [wheel] = made.directory.glob("*.whl")
    made.run(made.programs / "python", *pip, "install", "-q", wheel)
    return made


def test_the_wheel_has_the_plugin_and_the_harness_and_nothing_of_the_tests(installed: Installed) -> None:
    [wheel] = installed.directory.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.partition("/")[0] for name in names}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"gdb_kprobe", "kprobe_guest"}
    # Directories of modules that are gone may still hold what Python had compiled of them.
    of_the_package = {path.relative_to(CHECKOUT).parts[1] for path in (CHECKOUT / "gdb_kprobe").rglob("*.py")}
    installed_names = {name.split("/")[1] for name in names if name.startswith("gdb_kprobe/")}
    assert installed_names == of_the_package | {"configs", "py.typed"}


def test_the_printed_line_is_that_of_the_installed_plugin(installed: Installed) -> None:
    line = installed.gdbinit()
    assert line.startswith(f"source {installed.directory}/environment/")
    assert line.endswith("/gdb_kprobe/gdbext/load.py\n")
    assert line.count("\n") == 1


def test_a_gdb_with_the_line_in_its_init_file_has_the_commands_and_the_profiles(installed: Installed) -> None:
    (installed.directory / ".gdbinit").write_text(installed.gdbinit())
    shown = installed.run("gdb", "-q", "-batch", "-ex", "help kprobe")
    assert shown.stderr == ""
    for command in ("attach", "add", "list", "detach"):
        assert f"\nkprobe {command} -- " in shown.stdout
    # An error of "which guest?" names the profiles that were found.
    refused = installed.run("gdb", "-q", "-batch", "-ex", "kprobe attach nosuch", check=False)
    names = sorted(path.stem for path in (CHECKOUT / "configs").glob("*.yaml"))
    assert f"profiles: {', '.join(names)}" in refused.stderr


def test_what_only_guests_need_is_not_installed_and_asked_for_by_name(installed: Installed) -> None:
    packages = installed.run(installed.programs / "python", "-m", "pip", "list", "--format=freeze").stdout.lower()
    assert {line.partition("=")[0] for line in packages.split()} - {"pip", "setuptools"} == {
        "capstone", "gdb-kprobe", "numpy", "pyyaml",
    }  # fmt: skip
    refused = installed.run(installed.programs / "gdb-kprobe", "demo", check=False)
    assert refused.returncode == 1
    assert "is not installed, a Python package" in refused.stderr
    assert "pip install 'gdb-kprobe[guests]'" in refused.stderr


def test_the_plugin_of_another_python_than_that_of_gdb_is_refused(installed: Installed, tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.9" / "site-packages"
    [package] = installed.directory.glob("environment/lib/python*/site-packages/gdb_kprobe")
    shutil.copytree(package, packages / "gdb_kprobe")
    loader = packages / "gdb_kprobe" / "gdbext" / "load.py"
    said = installed.run("gdb", "-nx", "-q", "-batch", "-ex", f"source {loader}", check=False).stderr
    embedded = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"the plugin is installed for Python 3.9. gdb embeds Python {embedded}; " in said
    assert f"a virtual environment with python{embedded}" in said


def test_it_attaches_by_the_profile_debian_and_counts_every_call(installed: Installed, probed: Boot) -> None:
    guest = probed(GuestSpec(vcpus=2))
    line = installed.gdbinit().strip()
    with GdbMi(guest.environment, load=False) as gdb:
        gdb.console(line)
        where = gdb.console("python import gdb_kprobe, capstone; print(gdb_kprobe.__file__, capstone.__file__)").split()
        assert all(path.startswith(f"{installed.directory}/environment/") for path in where), where
        gdb.console("kprobe attach debian", timeout=_TIMEOUT)
        guest.add(gdb, "p:prio __x64_sys_getpriority")
        gdb.cont()
        guest.guest.run(f"workload syscall {GETPRIORITY} 23")
        gdb.interrupt()
        assert guest.hits(gdb) == {"prio": 23}
        watchdog = gdb.console("python print(gdb_kprobe.gdbext.api.attachment().watchdog)").strip()
        program = Path(f"/proc/{watchdog}/cmdline").read_bytes().split(b"\0")[0].decode()
        assert program.startswith(f"{installed.programs}/python3")
        gdb.console("kprobe detach")
