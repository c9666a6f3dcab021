"""``kprobe`` itself, and the short form ``kprobe p:NAME SYMBOL ...``."""

from __future__ import annotations

import re

import gdb

from gdb_kprobe.errors import KprobeError
from gdb_kprobe.gdbext.commands import add, complete, delete
from gdb_kprobe.gdbext.commands.base import Command
from gdb_kprobe.gdbext.errors import user_errors
from gdb_kprobe.render.nearest import nearest


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
            else:
                raise unknown(text)

    def complete(self, text: str, word: str | None) -> list[str]:
        return complete.answer(lambda text: (f"-:{name}" for name in complete.probes(text)), text, word)


def unknown(text: str) -> KprobeError:
    """What is wrong with *text*, which begins with no command."""
    word = text.split()[0]
    if re.match(r"r\d*:|r\d+\b", word):
        return KprobeError("not implemented yet: return probes", "probe the function's entry: kprobe p:NAME SYMBOL")
    if re.match(r"p\d+\b", word):
        return KprobeError(f"{word!r}: only return probes have a number of instances", "kprobe p:NAME SYMBOL")
    commands = _commands()
    near = nearest(word, commands)
    which = f"there are {', '.join(commands)}" if near is None else f"did you mean 'kprobe {near}'?"
    return KprobeError(
        f"kprobe has no command {word!r}",
        f"{which}{';' * (near is None)} 'help kprobe' says what each does; a definition begins with p: or p",
    )


def _commands() -> list[str]:
    """The names of the commands, as gdb lists them."""
    text = gdb.execute("help kprobe", to_string=True) or ""
    return re.findall(r"^kprobe ([a-z]{2,})\b", text, re.MULTILINE)


class ShortForm(Command):
    """Add a probe, written as in the kernel's kprobe_events.

    kprobe p[:[GROUP/]NAME] SYMBOL[+OFF]|MODULE:SYMBOL[+OFF]|0xADDR [ARG=%REG[:TYPE] ...] [if CONDITION]

    'help kprobe add' has the details.

    Example:
      kprobe p:open do_sys_openat2 dfd=%di:s32"""

    # gdb ends a command's word at the colon. Without a command of this very name, "p" would be short for "plan".
    letter = "p"

    def run(self, argument: str) -> None:
        joined = argument.startswith(":")
        add.add_definition(f"{self.letter}{'' if joined else ' '}{argument}")

    def candidates(self, text: str) -> list[str]:
        if not text.startswith(":"):
            return complete.definition(text)
        _, blank, rest = text.partition(" ")
        return complete.definition(rest) if blank else []


class ReturnForm(ShortForm):
    """Add a return probe, written as in the kernel's kprobe_events (not implemented yet).

    kprobe r[:[GROUP/]NAME] SYMBOL [ARG=$retval ...]"""

    letter = "r"


def register() -> None:
    KprobePrefix()
    ShortForm("p")
    ReturnForm("r")
