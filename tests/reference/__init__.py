"""``./install.sh reference``: the pages of docs/reference/ that are made of the docstrings of the sources.

The sources are read, not imported: the modules of the commands exist only inside gdb. tests/gdb compares what is read
with what gdb shows, and tests/unit/reference the pages with the files.
"""

from __future__ import annotations

import argparse

from tests.reference.pages import DIRECTORY, PAGES
from tests.support.command import Command


def arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run(options: argparse.Namespace) -> int:
    """Write the pages; returns the exit status."""
    for name, page in PAGES.items():
        path = DIRECTORY / name
        text = page()
        same = path.exists() and path.read_text() == text
        path.write_text(text)
        print(f"{path}: {'as it was' if same else 'written'}")
    return 0


COMMAND = Command("reference", "make the pages of docs/reference/ from the docstrings", arguments, run)
