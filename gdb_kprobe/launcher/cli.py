"""``gdb-kprobe attach|gdbinit|boot|demo|...``.

The verbs that boot guests need packages that a user of the plugin does not install. They are imported when one of those
verbs is used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gdb_kprobe.errors import KprobeError, ReportedError
from gdb_kprobe.launcher import gdbinit, start_gdb
from gdb_kprobe.launcher.verb import OF_GUESTS, Verb

OF_GDB = {
    "gdbinit": gdbinit.VERB,
    "attach": start_gdb.ATTACH,
    "adopt": start_gdb.ADOPT,
    "restore": start_gdb.RESTORE,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(words)
    except ReportedError as error:
        print(f"gdb-kprobe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gdb-kprobe", description="kprobes on a live QEMU guest, from outside")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    chosen = words[0] if words else ""
    for name, summary in {**{name: verb.summary for name, verb in OF_GDB.items()}, **OF_GUESTS}.items():
        sub = verbs.add_parser(name, help=summary, description=summary)
        if name == chosen:
            verb = OF_GDB.get(name) or _of_guests(name)
            verb.arguments(sub)
            sub.set_defaults(run=verb.run)
    arguments = parser.parse_args(words)
    try:
        return int(arguments.run(arguments))
    except ValueError as error:  # of a guest that cannot be
        parser.error(str(error))


def _of_guests(name: str) -> Verb:
    """:raises KprobeError: the packages for guests are not installed."""
    try:
        from gdb_kprobe.launcher.guest_verbs import VERBS
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("gdb_kprobe", "kprobe_guest"):
            raise
        raise KprobeError(
            f"'gdb-kprobe {name}' boots guests, and {error.name} is not installed, a Python package that this needs",
            f"{sys.executable} -m pip install 'gdb-kprobe[guests]'; in a checkout ./install.sh does that",
        ) from error
    return VERBS[name]


if __name__ == "__main__":
    sys.exit(main())
