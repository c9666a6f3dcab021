"""What a spec boots: built on first use, found in the cache afterwards."""

from __future__ import annotations

from kprobe_guest.build.bare import build_bare_image
from kprobe_guest.build.initramfs import KVM_MODULES, MODULES, build_initramfs
from kprobe_guest.build.kernel import find_kernel
from kprobe_guest.command_line import BootFiles
from kprobe_guest.spec import GuestSpec


def boot_files(spec: GuestSpec) -> BootFiles:
    """Files for QEMU's ``-kernel`` and ``-initrd``.

    :raises BuildError: they are not there and cannot be made.
    """
    if spec.kernel == "bare":
        return BootFiles(build_bare_image().path)
    kernel = find_kernel(spec.kernel, spec.modules)
    return BootFiles(kernel.vmlinuz, build_initramfs(kernel, KVM_MODULES if spec.root == "host" else MODULES))
