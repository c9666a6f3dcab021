"""The verbs of the ``gdb-kprobe`` launcher that set up and boot guests."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kprobe_guest.build.bare import build_bare_image
from kprobe_guest.build.initramfs import build_initramfs
from kprobe_guest.build.kernel import fetch_kernel
from kprobe_guest.errors import GuestError
from kprobe_guest.nesting import run_nested
from kprobe_guest.spec import KERNEL_NAMES, PROFILES, GuestSpec
from kprobe_guest.terminal import held_interrupts, how_to_end, join_console, open_console
from kprobe_guest.vm import GuestVm


@dataclass(frozen=True, slots=True)
class Subcommand:
    """One verb of the launcher: *arguments* declares its options, *run* returns the exit status."""

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run one verb of :data:`SUBCOMMANDS`."""
    parser = argparse.ArgumentParser(prog="gdb-kprobe", description="kprobes on a live QEMU guest, from outside")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for command in SUBCOMMANDS:
        sub = verbs.add_parser(command.name, help=command.summary, description=command.summary)
        command.arguments(sub)
        sub.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except GuestError as error:
        print(f"gdb-kprobe: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", default="all", metavar="NAME", help=f"bare, all, {KERNEL_NAMES}")


def _build(arguments: argparse.Namespace) -> int:
    names = {"all": ("debian", "newest"), "bare": ()}.get(arguments.kernel, (arguments.kernel,))
    for name in names:
        kernel = fetch_kernel(name)
        build_initramfs(kernel)
        print(f"{name}: {kernel.release}")
    if arguments.kernel in ("bare", "all"):
        print(f"bare: {build_bare_image().path}")
    return 0


def _boot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", default="debian", metavar="NAME", help=f"bare, {KERNEL_NAMES}")
    parser.add_argument("--modules", type=Path, metavar="DIR", help="lib/modules/RELEASE of a kernel given by its path")
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--memory", type=int, default=512, metavar="MIB")
    parser.add_argument("--cpu", choices=["max", "default"], default="max")
    parser.add_argument("--region", choices=["reserved", "ivshmem", "none"], default="reserved")
    parser.add_argument("--no-kaslr", action="store_true")
    parser.add_argument("--paused", action="store_true", help="leave the machine stopped at its reset vector")
    parser.add_argument("--directory", type=Path, help="where sockets and logs go (default: a new one in /tmp)")
    parser.add_argument("--append", default="", help="more words for the kernel's command line")
    parser.add_argument("--gdb", type=Path, help="also make this path a link to the gdbstub's socket")


def _boot(arguments: argparse.Namespace) -> int:
    spec = GuestSpec(
        kernel=arguments.kernel,
        vcpus=arguments.vcpus,
        memory_mb=arguments.memory,
        cpu=arguments.cpu,
        kaslr=not arguments.no_kaslr,
        region=arguments.region,
        extra_cmdline=tuple(arguments.append.split()),
        modules=arguments.modules,
    )
    guest = GuestVm(spec, arguments.directory)
    try:
        with held_interrupts():
            guest.start(paused=arguments.paused)
        if arguments.gdb is not None:
            arguments.gdb.unlink(missing_ok=True)
            arguments.gdb.symlink_to(guest.gdb_address)
        with open_console(guest) as console:  # before the guest's shell writes its prompt
            if not arguments.paused:
                guest.wait_ready()
            print(_how_to_attach(guest), flush=True)
            join_console(guest, console)
    finally:
        if arguments.gdb is not None:
            arguments.gdb.unlink(missing_ok=True)
        with held_interrupts():
            guest.close()
    return 0


def _nested_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS", help="end it then (%(default).0f)")
    parser.add_argument("program", metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")


def _nested(arguments: argparse.Namespace) -> int:
    """Run a command where there is KVM; returns its exit status."""
    command = [arguments.program, *arguments.arguments]
    return run_nested(command, lambda line: print(line, flush=True), timeout=arguments.timeout)


def boot_command(spec: GuestSpec) -> str:
    """The shell command that boots a guest like *spec*, for messages."""
    default = GuestSpec()
    words = ["gdb-kprobe", "boot", "--kernel", spec.kernel, "--vcpus", str(spec.vcpus)]
    if spec.modules is not None:
        words += ["--modules", str(spec.modules)]
    if spec.memory_mb != default.memory_mb:
        words += ["--memory", str(spec.memory_mb)]
    if spec.cpu != default.cpu:
        words += ["--cpu", spec.cpu]
    if spec.region != default.region:
        words += ["--region", spec.region]
    if not spec.kaslr:
        words.append("--no-kaslr")
    if spec.extra_cmdline:
        words += ["--append", " ".join(spec.extra_cmdline)]
    return shlex.join(words)


def _how_to_attach(guest: GuestVm) -> str:
    plugin = importlib.util.find_spec("gdb_kprobe")
    package = Path(plugin.origin).parent if plugin is not None and plugin.origin is not None else Path("gdb_kprobe")
    variables = {"KPROBE_GUEST": str(guest.directory)}
    if guest.spec.region == "none":
        variables["KPROBE_STUB"] = guest.gdb_address
    if guest.spec.kernel == "bare":
        variables["KPROBE_SYMBOLS"] = str(guest.bare_image().symbols_path)
    profile = "bare" if guest.spec.kernel == "bare" else PROFILES[guest.spec.region]
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    return (
        f"guest:    {guest.spec.label()}, logs and sockets in {guest.directory}\n"
        f"gdbstub:  {guest.gdb_address}\n"
        f"QMP:      {guest.qmp_path}\n"
        f"attach:   {words} gdb -ex 'source {package / 'gdbext' / 'load.py'}' -ex 'kprobe attach {profile}'\n"
        f"{how_to_end()}"
    )


SUBCOMMANDS = (
    Subcommand("build", "make everything that guests boot", _build_arguments, _build),
    Subcommand("boot", "boot a guest and show its console", _boot_arguments, _boot),
    Subcommand("nested", "run a command in an emulated machine that has KVM", _nested_arguments, _nested),
)
"""The harness's own verbs; the launcher adds those that need gdb."""


if __name__ == "__main__":
    sys.exit(main())
