"""``./install.sh torture fuzz``: what readers make of a guest whose memory holds anything.

A guest is booted, probed and left by a gdb that is killed, with a module and kprobes of its own. What each reader reads
of it is recorded by the page. Then each is asked again, thousands of times, and in what it read there is something
else: flipped bits, counts without an end, lists in a circle, pointers to elsewhere, names without an end, and control
characters. It must end in an answer or in an error of ours, within a number of seconds of a processor and of bytes
read; nothing that it shows holds a control character; and it writes nothing but what undoes the recorded session.

With ``--live N`` copies of a running guest are changed instead, and gdb is told to attach to them, to adopt and to
restore (:mod:`tests.torture.fuzz.live`).
"""

from __future__ import annotations

import argparse
import random
import time

from gdb_kprobe.render.text import table
from tests.torture.fuzz.live import fuzz_live
from tests.torture.fuzz.replaying import Fuzzer, Recording, record
from tests.torture.report import conclude, describe, guest_arguments, spec_of

__all__ = ["Fuzzer", "Recording", "arguments", "record", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--mutations", type=int, default=100_000, metavar="N", help="of recorded memory (100000)")
    parser.add_argument("--large", type=float, default=1.0, metavar="PERCENT", help="of them in what is large (1)")
    parser.add_argument("--only", default="", metavar="WORD", help="readers whose names have it")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the number of the first mutation (0)")
    parser.add_argument("--live", type=int, default=0, metavar="N", help="mutations of a running guest instead")
    parser.add_argument("--seed", type=int, help="of an earlier run")
    guest_arguments(parser, cpus=2)


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    started = time.monotonic()
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    spec = spec_of(options)
    number = options.live or options.mutations
    print(f"{number} mutations, {describe(spec)}, seed {seed}", flush=True)
    if options.live:
        problems, ends = fuzz_live(spec, number, seed, options.first)
        print(table(("how it ended", "times"), [(end, str(times)) for end, times in sorted(ends.items())]), flush=True)
        return conclude(started, number - len(problems), len(problems))
    fuzzer = Fuzzer(record(spec), seed, options.only)
    findings = fuzzer.run(number, options.large / 100, options.first)
    print(fuzzer.summary(), flush=True)
    return conclude(started, number - findings, findings)
