"""Kernels built from a source package: a real apt, dpkg-deb, tar and make, on a source that compiles nothing."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kprobe_guest.build import source
from kprobe_guest.build.debian import cached_kernel
from kprobe_guest.build.debug_info import fetch_debug_info
from kprobe_guest.build.kernel import fetch_kernel, find_kernel
from kprobe_guest.build.kernel_files import Kernel
from kprobe_guest.build.names import Series, SourceSeries, parse_name
from kprobe_guest.errors import BuildError

pytestmark = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("apt-get", "make", "xz")), reason="apt, make or xz is missing"
)

MAKEFILE = """
allnoconfig:
	@cp $(KCONFIG_ALLCONFIG) $(O)/.config; BROKEN
bzImage:
	@mkdir -p $(O)/arch/x86/boot $(O)/include/config
	@echo {version}$$(sed -n 's/^CONFIG_LOCALVERSION="\\(.*\\)"/\\1/p' $(O)/.config) >$(O)/include/config/kernel.release
	@cp $(O)/include/config/kernel.release $(O)/arch/x86/boot/bzImage
	@grep -c BTF=y $(O)/.config >$(O)/vmlinux || true
	@touch $(O)/System.map
	@echo built >>{log}
"""


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real kernel needs is not asked for."""
    monkeypatch.setattr(source, "check_tools", lambda: None)


def add_source(archive: Any, log: Path, version: str, *, broken: str = "true", **where: str) -> None:
    number = version.rpartition(".")[0]
    text = MAKEFILE.format(version=version, log=log).replace("BROKEN", broken).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as files:
        for name, data in (("Makefile", text), ("Documentation/what.rst", b"not wanted")):
            member = tarfile.TarInfo(f"linux-source-{number}/{name}")
            member.size = len(data)
            files.addfile(member, io.BytesIO(data))
    path = f"usr/src/linux-source-{number}.tar.xz"
    archive.add(f"linux-source-{number}", f"{version}-1", {path: packed.getvalue()}, **where)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("small", SourceSeries("", "nomodules")),
        ("small-nobtf", SourceSeries("", "nobtf")),
        ("6.12-nomodules", SourceSeries("6.12", "nomodules")),
        ("6.1-nobtf@stable", SourceSeries("6.1", "nobtf", "stable")),
        ("6.12-rt", Series("6.12", "rt")),
    ],
)
def test_a_name_says_what_is_built(name: str, meant: object) -> None:
    assert parse_name(name) == meant


@pytest.mark.parametrize("name", ["6-nomodules", "6.12.3-nomodules", "small@stable", "nomodules-small", "6.12-nobtf@"])
def test_a_name_that_means_nothing_is_an_error(name: str) -> None:
    with pytest.raises(BuildError, match="there is no kernel called"):
        fetch_kernel(name)


def test_one_build_makes_both_kernels_and_is_kept(archive: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    add_source(archive, log, "6.9.20")
    add_source(archive, log, "6.12.8")
    archive.publish()

    small = find_kernel("small")
    assert small.release.startswith("6.12.8-nomodules+"), "the highest version, and not the longest name"
    assert small.modules is None
    by_name = {name: cached_kernel(name) for name in ("small", "nomodules", "small-nobtf", "nobtf")}
    assert {name: kernel and kernel.release.partition("+")[0] for name, kernel in by_name.items()} == {
        "small": "6.12.8-nomodules", "nomodules": "6.12.8-nomodules",
        "small-nobtf": "6.12.8-nobtf", "nobtf": "6.12.8-nobtf",
    }  # fmt: skip
    assert small.vmlinuz.read_text().strip() == small.release
    without = find_kernel("6.12-nobtf")
    assert without.release.startswith("6.12.8-nobtf+")
    assert [fetch_debug_info(kernel).read_text() for kernel in (small, without)] == ["1\n", "0\n"]
    assert fetch_kernel("6.12-nomodules") == small
    assert log.read_text().split() == ["built"] * 2
    assert find_kernel("6.9-nomodules").release.startswith("6.9.20-nomodules+")


def test_a_newer_source_is_built_anew(archive: Any, tmp_path: Path) -> None:
    built = []
    for version in ("6.12.8", "6.12.10"):
        add_source(archive, tmp_path / "log", version)
        archive.publish()
        built.append(fetch_kernel("small"))
    assert [kernel.release.partition("-")[0] for kernel in built] == ["6.12.8", "6.12.10"]


def test_another_configuration_is_built_anew(archive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_source(archive, tmp_path / "log", "6.12.8")
    archive.publish()
    before = fetch_kernel("small")
    monkeypatch.setattr(source, "_config", lambda: "CONFIG_OTHER=y\n")
    assert fetch_kernel("small").release != before.release


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("false", "failed"),
        ("echo CONFIG_KPROBES=y >>$(O)/.config", "another one than asked for: KPROBES is on$"),
        ("echo CONFIG_DEBUG_INFO_BTF=y >>$(O)/.config", "another one than asked for: DEBUG_INFO_BTF is on$"),
    ],
)
def test_a_build_that_fails_is_an_error_and_leaves_nothing(
    archive: Any, tmp_path: Path, broken: str, said: str
) -> None:
    add_source(archive, tmp_path / "log", "6.12.8", broken=broken)
    archive.publish()
    with pytest.raises(BuildError, match=said):
        fetch_kernel("small")
    kernels = tmp_path / "cache" / "gdb-kprobe" / "kernels"
    assert list(kernels.iterdir()) == []


def test_types_that_are_asked_for_and_do_not_come_are_told_of(archive: Any, tmp_path: Path) -> None:
    """kconfig leaves them out where its pahole is too old."""
    add_source(archive, tmp_path / "log", "6.12.8", broken="sed -i /BTF/d $(O)/.config")
    archive.publish()
    with pytest.raises(BuildError, match="another one than asked for: DEBUG_INFO_BTF is off: is pahole too old"):
        fetch_kernel("small")


def test_what_a_build_that_was_killed_has_left_goes_with_the_next(archive: Any, tmp_path: Path) -> None:
    add_source(archive, tmp_path / "log", "6.12.8")
    archive.publish()
    left = tmp_path / "cache" / "gdb-kprobe" / "kernels" / ".compiling-abc"
    (left / "linux-source-6.12").mkdir(parents=True)
    fetch_kernel("small")
    assert not left.exists()


def test_a_source_that_is_packed_otherwise_is_an_error(archive: Any) -> None:
    archive.add("linux-source-6.12", "6.12.8-1", {"usr/src/linux-6.12.tar.gz": b""})
    archive.publish()
    with pytest.raises(BuildError, match=r"has nothing where one linux-source-\*.tar.xz is expected"):
        fetch_kernel("small")


def test_where_no_new_one_can_be_built_the_old_one_does(
    archive: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_source(archive, tmp_path / "log", "6.12.8")
    archive.publish()
    old: Kernel = fetch_kernel("small")
    add_source(archive, tmp_path / "log", "6.12.9", broken="false")
    archive.publish()
    assert fetch_kernel("small") == old
    assert f"using the cached kernel {old.release}" in capsys.readouterr().err


def test_a_source_that_nobody_serves_is_an_error_that_says_where_it_was_looked_for(archive: Any) -> None:
    archive.publish()
    with pytest.raises(BuildError, match=r"no source of a kernel 6\.12-nomodules was found:\nthis machine's package"):
        fetch_kernel("6.12-nomodules")


def test_what_is_missing_to_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError, match="sudo apt-get install gcc make flex bison"):
        source.check_tools()
