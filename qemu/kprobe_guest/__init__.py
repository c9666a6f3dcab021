"""Guests to try kprobes on: built from Debian's packages, run by QEMU, driven from Python."""

from kprobe_guest.errors import BuildError, GuestError, GuestFailedError, GuestTimeoutError, LaunchError
from kprobe_guest.snapshots import Snapshots
from kprobe_guest.spec import GuestSpec
from kprobe_guest.template import Template, template_of
from kprobe_guest.vm import GuestVm

__all__ = [
    "BuildError",
    "GuestError",
    "GuestFailedError",
    "GuestSpec",
    "GuestTimeoutError",
    "GuestVm",
    "LaunchError",
    "Snapshots",
    "Template",
    "template_of",
]
