"""``gdb-kprobe check --all``: classify every instruction of a guest's kernel, without a gdb."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gdb_kprobe.guest.linux import MODULES, open_linux
from gdb_kprobe.guest.survey import survey
from gdb_kprobe.guest.symbol_text import read_references
from gdb_kprobe.kprobes.patch import TextMap
from gdb_kprobe.model import Boost
from gdb_kprobe.render.check import survey as render_survey
from gdb_kprobe.target.ram import RamView, SharedRam
from gdb_kprobe.target.rsp import RspSocket
from gdb_kprobe.target.stub import QemuStub
from kprobe_guest import GuestSpec, GuestVm
from kprobe_guest.spec import KERNEL_NAMES


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--all", action="store_true", required=True, help="every instruction of the guest's live text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts to this file")
    parser.add_argument("--kernel", default="debian", metavar="NAME", help=KERNEL_NAMES)
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--append", default="", help="more words for the kernel's command line")
    parser.add_argument("--boost", choices=[str(boost) for boost in Boost], default=str(Boost.RELOCATE))


def run(options: argparse.Namespace) -> int:
    """Boot, classify, print the table, write the file; returns the exit status."""
    spec = GuestSpec(kernel=options.kernel, vcpus=options.vcpus, extra_cmdline=tuple(options.append.split()))
    boost = Boost(options.boost)
    with GuestVm(spec) as vm, RspSocket(vm.gdb_address) as channel:
        stub = QemuStub(channel)
        guest = open_linux(stub, RamView(stub, SharedRam.discover(stub)))
        snapshot = guest.snapshot(TextMap())
        channel.detach()
        # The region may be anywhere in the module area: what is in reach of all of it is in reach of the region.
        found = survey(guest, snapshot, MODULES, boost, _progress, read_references(snapshot))
    print(render_survey(found, guest.description, guest.boost_rules))
    if options.json is not None:
        options.json.write_text(json.dumps(found.as_json(guest.release), indent=2) + "\n")
    return 0


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == of else ""
        print(f"\r{done * 100 // of:3} % of {of >> 20} MiB", end=end, file=sys.stderr, flush=True)
