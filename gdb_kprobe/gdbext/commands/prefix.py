"""``kprobe`` itself, and the short form ``kprobe p:NAME SYMBOL ...``."""

from __future__ import annotations

import re

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext.commands import add, complete, delete
from gdb_kprobe.gdbext.errors import user_errors

_SHORT_FORM = re.compile(r"[pr][:\d\s]|[pr]$|-:")


class KprobePrefix(gdb.Command):
    """Put kprobes on the guest's kernel, from outside.

    A first session:
      kprobe attach debian
      kprobe p:open do_sys_openat2 dfd=%di:s32
      kprobe trace
    Ctrl-C ends the trace; 'kprobe detach' undoes everything.

    Short form, as in the kernel's kprobe_events:
      kprobe p[:[GROUP/]NAME] SYMBOL[+OFF]|MODULE:SYMBOL[+OFF]|0xADDR [ARG=%REG[:TYPE] ...] [if CONDITION]
      kprobe -:NAME    deletes the probe"""

    def __init__(self) -> None:
        super().__init__("kprobe", gdb.COMMAND_BREAKPOINTS, prefix=True)

    def invoke(self, argument: str, from_tty: bool) -> None:
        text = argument.strip()
        with user_errors():
            if not text:
                gdb.execute("help kprobe")
            elif text.startswith("-:"):
                delete.delete_named(text[2:].rpartition("/")[2])
            elif _SHORT_FORM.match(text):
                add.add_definition(text)
            else:
                word = text.split()[0]
                raise KprobeError(
                    f"kprobe has no command {word!r}", "'help kprobe' lists them; a definition begins with p: or p"
                )

    def complete(self, text: str, word: str) -> list[str]:
        return complete.symbols(word)
