"""The guest's user land: busybox, /init, a few of the kernel's own modules, the workload program.

A cpio archive of the "newc" kind (Documentation/driver-api/early-userspace/buffer-format.rst), written here so that it
needs no root and is the same, byte for byte, for the same content.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import stat
from dataclasses import dataclass
from pathlib import Path

from kprobe_guest.build.cache import build_lock, cache_directory, progress, read_tool, run_tool, write_atomically
from kprobe_guest.build.kernel_files import Kernel
from kprobe_guest.build.workload import build_workload
from kprobe_guest.errors import BuildError

DATA = Path(__file__).resolve().parent.parent / "data"

BUSYBOX = (Path("/bin/busybox"), Path("/usr/bin/busybox"))

# Loaded by the guest's init, with what they depend on: a device driver, a network driver of two ends, one with
# several modules under it. Only names that Debian's cloud kernels have had from 6.1 on.
MODULES = ("dummy", "veth", "loop", "tun", "bridge")

KVM_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "kvm_amd")
"""For a guest that has the host's root file system, and is to have KVM: TCG emulates an AMD processor, with SVM."""


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def build_initramfs(kernel: Kernel, modules: tuple[str, ...] = MODULES) -> Path:
    """Make (or find) the initramfs of *kernel*, with *modules* and what they depend on, and return its path.

    :raises BuildError: busybox is missing or not static, or a module is compressed in an unknown way.
    """
    busybox = _busybox()
    workload = build_workload().read_bytes()
    init = (DATA / "init").read_bytes()
    # By what goes in, not by what comes out: this is asked at every start of a guest, and unpacking modules takes long.
    ingredients = (
        kernel.origin,
        Path(__file__).read_bytes(),
        busybox,
        workload,
        init,
        " ".join(modules).encode(),
    )
    digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in ingredients)).hexdigest()[:16]
    path = cache_directory() / "initramfs" / f"{kernel.release}-{digest}.cpio"
    if not path.exists():
        with build_lock():
            progress(f"writing the initramfs of {kernel.release}")
            write_atomically(path, _newc(_entries(kernel, modules, busybox, workload, init)))
    return path


def _entries(kernel: Kernel, modules: tuple[str, ...], busybox: bytes, workload: bytes, init: bytes) -> list[_Entry]:
    directories = ["bin", "sbin", "dev", "proc", "sys", "tmp", "etc", "modules", "root", "host"]
    entries = [_Entry(name, stat.S_IFDIR | 0o755) for name in directories]
    entries.append(_Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(_Entry("init", stat.S_IFREG | 0o755, init))
    entries.append(_Entry("bin/busybox", stat.S_IFREG | 0o755, busybox))
    entries += [_Entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in _applets()]
    entries.append(_Entry("bin/workload", stat.S_IFREG | 0o755, workload))
    order = module_order(kernel, modules)
    entries += [
        _Entry(f"modules/{path.name.split('.')[0]}.ko", stat.S_IFREG | 0o644, _decompress(path)) for path in order
    ]
    names = "".join(f"{path.name.split('.')[0]}.ko\n" for path in order)
    entries.append(_Entry("modules/order", stat.S_IFREG | 0o644, names.encode()))
    return entries


def _busybox() -> bytes:
    for path in BUSYBOX:
        if path.exists():
            data = path.read_bytes()
            if b"/lib64/ld-linux" in data[:4096]:
                raise BuildError(f"{path} is dynamically linked; run: sudo apt-get install busybox-static")
            return data
    raise BuildError("busybox is not installed; run: sudo apt-get install busybox-static")


def _applets() -> list[str]:
    """Names under which the guest's scripts call busybox."""
    return [name for name in run_tool(["busybox", "--list"], package="busybox-static").split() if name != "busybox"]


def module_order(kernel: Kernel, names: tuple[str, ...]) -> list[Path]:
    """Files of the modules *names* and of all they depend on, in an order in which they can be loaded.

    ``modules.dep`` lists for each module all that it needs, nearest last to be loaded first when read backwards
    (depmod(8)). What the kernel has built in, or does not have, is left out.
    """
    if kernel.modules is None:
        return []
    built_in = kernel.modules / "modules.builtin"
    inside = {_module_name(line) for line in built_in.read_text().splitlines()} if built_in.exists() else set()
    dependencies: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        paths[_module_name(path)] = path
        dependencies[path] = needs.split()
    order: list[str] = []
    for name in names:
        if name in inside:
            continue
        if name not in paths:
            progress(f"kernel {kernel.release} has no module {name}: the guest goes without")
            continue
        order += [path for path in [*reversed(dependencies[paths[name]]), paths[name]] if path not in order]
    return [kernel.modules / path for path in order]


def _module_name(path: str) -> str:
    return Path(path).name.split(".")[0].replace("-", "_")


def _decompress(path: Path) -> bytes:
    """A module's content: Debian has it as it is or as .xz, Fedora as .xz, Arch and Ubuntu as .zst."""
    data = path.read_bytes()
    match path.suffix:
        case ".ko":
            return data
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
        case ".zst":
            return read_tool(["zstd", "-dcq", str(path)], package="zstd")
    raise BuildError(f"{path}: a module compressed in a way that is not known ({path.suffix}; .xz, .gz and .zst are)")


def _newc(entries: list[_Entry]) -> bytes:
    """The archive: for each entry a header of 13 hexadecimal fields, the name, the data, each padded to 4 bytes."""
    out = bytearray()
    for number, entry in enumerate([*entries, _Entry("TRAILER!!!", 0)], start=1):
        name = entry.path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (
            number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0,
        )  # fmt: skip
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)
