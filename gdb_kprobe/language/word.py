"""One whitespace-separated word of a definition, which knows where it stood."""

from __future__ import annotations

from dataclasses import dataclass

from gdb_kprobe.errors import SyntaxRefusedError


@dataclass(frozen=True, slots=True)
class Word:
    """*text* begins at *column* of *line*."""

    text: str
    column: int
    line: str

    def part(self, start: int) -> Word:
        """The word from its character *start* on."""
        return Word(self.text[start:], self.column + start, self.line)

    def error(self, message: str, offset: int = 0, hint: str = "") -> SyntaxRefusedError:
        """An error that points at character *offset* of the word."""
        return SyntaxRefusedError(message, self.line, self.column + offset, hint)
