"""Which word was meant by one that is not known."""

from __future__ import annotations

from collections.abc import Iterable

_SHORT = 5
"""Letters of a word in which one slip is likely, and two make another word of it."""


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of *words* that *word* is a slip of the fingers away from; ``None``: it is none of them.

    A slip is a letter that is missing, too much or another one, or two that change places. Two are forgiven in a word
    of more than five letters. Capitals do not matter.
    """
    found = [(_slips(word.lower(), other.lower()), other) for other in words]
    slips, other = min(found, default=(0, None))
    return other if slips <= (1 if len(word) <= _SHORT else 2) else None


def _slips(word: str, other: str) -> int:
    """How many slips there are between the two (the distance of Damerau and Levenshtein, of adjacent letters)."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(word, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and letter == other[j - 2] and word[i - 2] == wanted:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]
