"""Kernels from packages as Debian makes them, from 12 on: a real apt and dpkg-deb on a small archive of our own."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kprobe_guest.build.initramfs import _decompress, module_order
from kprobe_guest.build.kernel import Kernel, cached_kernel, fetch_kernel
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


def whole(archive: Any, release: str, files: Mapping[str, bytes], version: str = "1") -> None:
    archive.add(f"linux-image-{release}", version, files, depends=("kmod", "linux-base (>= 4)"))
    archive.add(META, version, depends=(f"linux-image-{release} (= {version})",))


def split(archive: Any, release: str, *, modules: bool = True) -> None:
    """As Debian has it since 6.19."""
    parts = {
        "binary": {f"usr/lib/modules/{release}/vmlinuz": b"vmlinuz"},
        "modules": modules_at("usr/lib/modules", release),
        "base": {f"usr/lib/modules/{release}/{name}": name.encode() for name in ("config", "System.map")},
    }
    names = [f"linux-{part}-{release}" for part in parts]
    archive.add(f"linux-image-{release}", "2", depends=("initramfs-tools", "linux-base (>= 4)", *names))
    for part, files in parts.items():
        if part != "modules" or modules:
            archive.add(f"linux-{part}-{release}", "2", files)
    archive.add(META, "2", depends=(f"linux-image-{release}", "linux-modules-cloud-amd64"))


def complete(kernel: Kernel) -> None:
    assert kernel.vmlinuz.read_bytes() == b"vmlinuz"
    assert (kernel.directory / "config").read_bytes() == b"config"
    assert (kernel.directory / "System.map").read_bytes() == b"System.map"
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

    (kernel.directory / "package.json").write_text("not JSON")
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
    assert not [path for path in kernel.directory.parent.iterdir() if path.name.startswith(".")], "something was left"


def test_lists_without_the_kernel_are_an_error_that_says_what_to_do(archive: Any) -> None:
    archive.add("hello", "1")
    archive.publish()
    for kind in ("debian", "newest"):
        with pytest.raises(BuildError, match="run: sudo apt-get update"):
            fetch_kernel(kind)


def with_modules(directory: Path, **files: str) -> Kernel:
    kernel = Kernel("1.2.3", directory)
    kernel.modules.mkdir(parents=True)
    for name, text in files.items():
        (kernel.modules / name.replace("_", ".")).write_text(text)
    return kernel


def test_modules_are_loaded_behind_what_they_need_and_built_in_ones_not_at_all(tmp_path: Path) -> None:
    kernel = with_modules(
        tmp_path,
        modules_dep="kernel/a/bridge.ko.zst: kernel/a/stp.ko.zst kernel/a/llc.ko.zst\nkernel/a/stp.ko.zst:\n"
        "kernel/a/llc.ko.zst:\n",
        modules_builtin="kernel/drivers/block/loop.ko\n",
    )

    order = module_order(kernel, ("loop", "bridge"))

    assert [path.name for path in order] == ["llc.ko.zst", "stp.ko.zst", "bridge.ko.zst"]
    with pytest.raises(BuildError, match=r"kernel 1\.2\.3 has no module dummy"):
        module_order(kernel, ("dummy",))


def test_a_kernel_without_modules_has_none_to_load(tmp_path: Path) -> None:
    assert module_order(with_modules(tmp_path, modules_dep=""), ("dummy", "loop")) == []


def zstd(data: bytes) -> bytes:
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_modules_are_unpacked_however_they_are_compressed(tmp_path: Path, suffix: str) -> None:
    content = b"\x7fELF" + bytes(range(256)) * 10
    pack = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstd}[suffix]
    path = tmp_path / f"dummy.ko{suffix}"
    path.write_bytes(pack(content))

    assert _decompress(path) == content


def test_an_unknown_compression_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "dummy.ko.rar"
    path.touch()
    with pytest.raises(BuildError, match=r"dummy\.ko\.rar.*\.xz, \.gz and \.zst are"):
        _decompress(path)
