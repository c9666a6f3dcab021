"""Kernels from packages as Debian makes them, from 12 on: a real apt and dpkg-deb on a small archive of our own."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kprobe_guest.build.debian import cached_kernel, fetch_kernel
from kprobe_guest.build.initramfs import _decompress, module_order
from kprobe_guest.build.kernel import find_kernel
from kprobe_guest.build.kernel_files import Kernel
from kprobe_guest.errors import BuildError

META = "linux-image-cloud-amd64"
OLD = "6.1.0-9-cloud-amd64"
NEW = "6.12.10+deb13-cloud-amd64"
SPLIT = "7.3.4+deb13-cloud-amd64"

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is not installed")


def modules_at(place: str, release: str) -> dict[str, bytes]:
    return {f"{place}/{release}/kernel/drivers/net/dummy.ko": b"\x7fELF", f"{place}/{release}/modules.order": b""}


def boot(release: str) -> dict[str, bytes]:
    return {f"boot/{name}-{release}": name.encode() for name in ("vmlinuz", "config", "System.map")}


def whole(
    archive: Any, release: str, files: Mapping[str, bytes] | None = None, version: str = "1", **where: str
) -> None:
    """A kernel in one package."""
    if files is None:
        files = boot(release) | modules_at("lib/modules", release)
    archive.add(f"linux-image-{release}", version, files, depends=("kmod", "linux-base (>= 4)"), **where)
    archive.add(META, version, depends=(f"linux-image-{release} (= {version})",))


def split(archive: Any, release: str, *, modules: bool = True, **where: str) -> None:
    """As Debian has it since 6.19."""
    parts = {
        "binary": {f"usr/lib/modules/{release}/vmlinuz": b"vmlinuz"},
        "modules": modules_at("usr/lib/modules", release),
        "base": {f"usr/lib/modules/{release}/{name}": name.encode() for name in ("config", "System.map")},
    }
    names = [f"linux-{part}-{release}" for part in parts]
    archive.add(f"linux-image-{release}", "2", depends=("initramfs-tools", "linux-base (>= 4)", *names), **where)
    for part, files in parts.items():
        if part != "modules" or modules:
            archive.add(f"linux-{part}-{release}", "2", files, **where)
    archive.add(META, "2", depends=(f"linux-image-{release}", "linux-modules-cloud-amd64"))


def complete(kernel: Kernel) -> None:
    assert kernel.vmlinuz.read_bytes() == b"vmlinuz"
    assert (kernel.vmlinuz.parent / "config").read_bytes() == b"config"
    assert (kernel.vmlinuz.parent / "System.map").read_bytes() == b"System.map"
    assert kernel.modules is not None
    assert (kernel.modules / "kernel/drivers/net/dummy.ko").read_bytes() == b"\x7fELF"
    assert (kernel.modules / "modules.dep").read_text() == "kernel/drivers/net/dummy.ko:\n"
    assert cached_kernel("debian") == kernel


@pytest.mark.parametrize("place", ["lib/modules", "usr/lib/modules"])
def test_modules_are_found_with_and_without_a_merged_usr(archive: Any, place: str) -> None:
    whole(archive, OLD, boot(OLD) | modules_at(place, OLD))
    archive.publish()

    kernel = fetch_kernel("debian")

    assert kernel.release == OLD
    complete(kernel)


def test_a_kernel_in_several_packages_is_put_together(archive: Any) -> None:
    split(archive, SPLIT)
    archive.publish()

    kernel = fetch_kernel("debian")

    assert kernel.release == SPLIT
    complete(kernel)


def test_the_newest_is_the_highest_version_and_not_the_longest_name(archive: Any) -> None:
    for release in (OLD, NEW, "6.12.9+deb13-cloud-amd64", "6.12.10+deb13-amd64"):
        whole(archive, release, boot(release) | modules_at("lib/modules", release))
    archive.publish()

    assert fetch_kernel("newest").release == NEW


def test_what_is_in_the_cache_is_not_fetched_again(archive: Any, capsys: pytest.CaptureFixture[str]) -> None:
    whole(archive, OLD, boot(OLD) | modules_at("lib/modules", OLD))
    archive.publish()
    kernel = fetch_kernel("debian")
    assert "fetching" in capsys.readouterr().err

    assert fetch_kernel("debian") == kernel
    assert capsys.readouterr().err == ""

    (kernel.vmlinuz.parent / "package.json").write_text("not JSON")
    assert fetch_kernel("debian") == kernel
    assert "fetching" in capsys.readouterr().err
    complete(kernel)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"usr/share/doc/readme": b""}, "the kernel's packages hold no boot/vmlinuz-7.3.4+deb13-cloud-amd64"),
        (
            modules_at("usr/lib/modules", SPLIT),
            f"or usr/lib/modules/{SPLIT}/vmlinuz; there are files in: usr/lib/modules",
        ),
    ],
    ids=["nothing", "no vmlinuz"],
)
def test_packages_without_a_kernel_are_an_error_or_the_cached_one_is_used(
    archive: Any, capsys: pytest.CaptureFixture[str], files: Mapping[str, bytes], said: str
) -> None:
    whole(archive, SPLIT, files, version="2")
    archive.publish()
    with pytest.raises(BuildError) as error:
        fetch_kernel("debian")
    assert said in str(error.value)

    whole(archive, NEW, boot(NEW) | modules_at("lib/modules", NEW), version="3")
    archive.publish()
    kernel = fetch_kernel("debian")
    complete(kernel)

    whole(archive, SPLIT, files, version="4")
    archive.publish()
    capsys.readouterr()
    assert fetch_kernel("debian") == kernel
    shown = capsys.readouterr().err
    assert f"using the cached kernel {NEW}" in shown
    assert said in shown
    complete(kernel)
    assert not [path for path in kernel.vmlinuz.parent.parent.iterdir() if path.name.startswith(".")], (
        "something was left"
    )


def test_lists_without_the_kernel_are_an_error_that_says_what_to_do(archive: Any) -> None:
    archive.add("hello", "1")
    archive.publish()
    for kind in ("debian", "newest"):
        with pytest.raises(BuildError, match="run: sudo apt-get update"):
            fetch_kernel(kind)


def test_a_series_is_its_highest_release_of_the_flavour(archive: Any) -> None:
    for release in (
        "6.1.0-9-cloud-amd64",
        "6.1.0-10-cloud-amd64",
        "6.1.0-11-amd64",
        "6.1.0-8-rt-amd64",
        "6.12.9+deb13-cloud-amd64",
        "6.12.10+deb13-cloud-amd64",
        "6.12.11+deb13-cloud-amd64-unsigned",
    ):
        whole(archive, release)
    archive.publish()

    names = ("6.1", "6.1-cloud", "6.1-generic", "6.1-rt", "6.12", "cloud", "rt")
    assert {name: fetch_kernel(name).release for name in names} == {
        "6.1": "6.1.0-10-cloud-amd64",
        "6.1-cloud": "6.1.0-10-cloud-amd64",
        "6.1-generic": "6.1.0-11-amd64",
        "6.1-rt": "6.1.0-8-rt-amd64",
        "6.12": "6.12.10+deb13-cloud-amd64",
        "cloud": "6.12.10+deb13-cloud-amd64",
        "rt": "6.1.0-8-rt-amd64",
    }
    found = cached_kernel("6.1-generic")
    assert found is not None
    assert found.release == "6.1.0-11-amd64"


def test_a_series_of_another_suite_is_found_and_the_machine_does_not_change(archive: Any, tmp_path: Path) -> None:
    whole(archive, OLD)
    whole(archive, "6.16.3+deb13-cloud-amd64", suite="stable")
    split(archive, SPLIT, suite="stable-backports")
    archive.publish()
    before = sorted(path.name for path in (tmp_path / "state" / "lists").iterdir())

    assert fetch_kernel("7.3").release == SPLIT
    assert fetch_kernel("6.16").release == "6.16.3+deb13-cloud-amd64"
    assert fetch_kernel("6.1").release == OLD
    assert fetch_kernel("newest").release == OLD, "what the machine's lists serve"
    assert sorted(path.name for path in (tmp_path / "state" / "lists").iterdir()) == before

    assert fetch_kernel("6.16@stable").release == "6.16.3+deb13-cloud-amd64"
    with pytest.raises(BuildError, match=r"no kernel 6\.16-cloud@stable-backports was found:\nstable-backports: ser"):
        fetch_kernel("6.16@stable-backports")


def test_a_series_that_nobody_serves_is_an_error_that_says_where_it_was_looked_for(archive: Any) -> None:
    whole(archive, OLD)
    whole(archive, OLD, suite="stable")
    archive.publish()
    with pytest.raises(BuildError) as error:
        fetch_kernel("5.10-rt")
    said = str(error.value)
    assert said.startswith("no kernel 5.10-rt was found:\nthis machine's package lists: serves none\n")
    assert "stable: serves none" in said
    assert "unstable: failed" in said, "the archive has no such suite"


def test_a_kernel_whose_modules_are_not_served_is_taken_only_when_there_is_no_other(
    archive: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    split(archive, "7.0.9+deb13-cloud-amd64", modules=False)
    archive.publish()
    kernel = fetch_kernel("7.0")
    assert kernel.release == "7.0.9+deb13-cloud-amd64"
    assert "linux-modules-7.0.9+deb13-cloud-amd64 is not served any more" in capsys.readouterr().err
    assert module_order(kernel, ("dummy",)) == []

    split(archive, "7.0.8+deb13-cloud-amd64")
    archive.publish()
    assert fetch_kernel("7.0").release == "7.0.8+deb13-cloud-amd64"


@pytest.mark.parametrize(
    "name", ["", "6", "6.12-", "6.12-cloud-rt", "cloud-6.12", "debain", "6.12@", "6.12@../x", "v6.12", "bare"]
)
def test_a_name_that_means_nothing_is_an_error_that_says_what_does(archive: Any, name: str) -> None:
    with pytest.raises(BuildError, match=r"there is no kernel called .*debian, newest, a series such as 6.12"):
        fetch_kernel(name)


def test_what_is_in_the_cache_does_when_the_archive_is_gone(archive: Any, tmp_path: Path) -> None:
    split(archive, SPLIT, suite="stable-backports")
    archive.publish()
    kernel = fetch_kernel("7.3")
    shutil.rmtree(tmp_path / "archive")
    assert fetch_kernel("7.3") == kernel
    assert find_kernel("7.3") == kernel


def bzimage(release: str) -> bytes:
    """As much of the setup as says what it is (Documentation/arch/x86/boot.rst)."""
    setup = bytearray(0x1000)
    setup[0x202:0x206] = b"HdrS"
    setup[0x20E:0x210] = (0x600).to_bytes(2, "little")
    setup[0x800 : 0x800 + len(release)] = release.encode()
    return bytes(setup)


def test_a_kernel_by_its_path_says_its_release_itself(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage("7.1.0-rc3+ (me@here) #1 SMP"))

    kernel = find_kernel(str(path))

    assert (kernel.release, kernel.vmlinuz, kernel.modules) == ("7.1.0-rc3+", path, None)
    path.write_bytes(bzimage("7.1.0-rc3+ (me@here) #2 SMP PREEMPT"))
    os.utime(path, ns=(1, 1))
    assert find_kernel(str(path)).origin != kernel.origin, "another one: its initramfs is made anew"


def test_modules_are_those_given_or_those_beside_the_vmlinuz(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage("6.9.1-arch1-1 (linux@archlinux) #1"))
    given = tmp_path / "given"
    given.mkdir()
    with pytest.raises(BuildError, match=r"has no modules\.dep; give the directory lib/modules/6\.9\.1-arch1-1"):
        find_kernel(str(tmp_path / "vmlinuz"), given)
    (given / "modules.dep").touch()
    assert find_kernel(str(tmp_path / "vmlinuz"), given).modules == given
    (tmp_path / "modules.dep").touch()
    assert find_kernel(str(tmp_path / "vmlinuz")).modules == tmp_path


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\x7fELF" + bytes(0x1000), "give the bzImage"), (b"", "give the bzImage"), (None, "cannot be read")],
)
def test_a_path_to_something_else_is_an_error(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "vmlinux"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildError, match=said):
        find_kernel(str(path))


def with_modules(directory: Path, **files: str) -> Kernel:
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)
    return Kernel("1.2.3", directory / "vmlinuz", directory, b"")


def test_modules_are_loaded_behind_what_they_need_and_those_that_are_not_there_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = with_modules(
        tmp_path,
        modules_dep="kernel/a/bridge.ko.zst: kernel/a/stp.ko.zst kernel/a/llc.ko.zst\nkernel/a/stp.ko.zst:\n"
        "kernel/a/llc.ko.zst:\n",
        modules_builtin="kernel/drivers/block/loop.ko\n",
    )

    order = module_order(kernel, ("loop", "bridge", "dummy"))

    assert [path.name for path in order] == ["llc.ko.zst", "stp.ko.zst", "bridge.ko.zst"]
    assert capsys.readouterr().err == "gdb-kprobe: kernel 1.2.3 has no module dummy: the guest goes without\n"


def test_a_kernel_without_modules_has_none_to_load(tmp_path: Path) -> None:
    assert module_order(Kernel("1.2.3", tmp_path / "vmlinuz", None, b""), ("dummy", "loop")) == []


def zstd(data: bytes) -> bytes:
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_modules_are_unpacked_however_they_are_compressed(tmp_path: Path, suffix: str) -> None:
    content = b"\x7fELF" + bytes(range(256)) * 10
    packers: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstd}
    path = tmp_path / f"dummy.ko{suffix}"
    path.write_bytes(packers[suffix](content))

    assert _decompress(path) == content


def test_an_unknown_compression_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "dummy.ko.rar"
    path.touch()
    with pytest.raises(BuildError, match=r"dummy\.ko\.rar.*\.xz, \.gz and \.zst are"):
        _decompress(path)
