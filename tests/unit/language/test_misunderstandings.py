"""What users of other tools type: the whole answer, word for word."""

from __future__ import annotations

import pytest

from gdb_kprobe.errors import SyntaxRefusedError
from gdb_kprobe.language.definition import parse_definition

MEMORY = "compare registers; a handler in Python reads memory: hit.read_int(hit.regs.di)"

TYPED = [
    ("p vfs_read x = %di", "a space in front of '='", 13, "write the argument as one word: x=%di"),
    ("p vfs_read x= %di", "a space behind '='", 13, "write the argument as one word: x=%di"),
    ("p vfs_read x =%di", "a space in front of '='", 13, "write the argument as one word: x=%di"),
    ("p vfs_read +5", "a space in front of the offset", 11, "write it as one word: vfs_read+5"),
    ("p vfs_read + 0x10", "a space in front of the offset", 11, "write it as one word: vfs_read+0x10"),
    ("p vfs_read -5", "a space in front of the offset", 11, "write it as one word: vfs_read-5"),
    ("p *0xffffffff81000000", "Invalid probed address or symbol", 2, "leave the '*' away: 0xffffffff81000000"),
    ("p &vfs_read", "Invalid probed address or symbol", 2, "leave the '&' away: vfs_read"),
    ("p vfs_read %di:S32", "Unknown type is specified", 15, "did you mean s32?"),
    ("p vfs_read %di:int", "Unknown type is specified", 15, "did you mean s32?"),
    ("p vfs_read if *(int*)di == 3", "not implemented yet: reading memory in conditions", 14, MEMORY),
    ("p vfs_read if si && *di == 3", "not implemented yet: reading memory in conditions", 20, MEMORY),
    ("p vfs_read if (int *)di", "not implemented yet: reading memory in conditions", 19, MEMORY),
    ("p vfs_read if (int)di == 3", "Invalid cast", 15, "casts are written like calls: s32(di)"),
    ("p vfs_read if di == 3 and si == 4", "Invalid operator 'and'", 22, "write '&&', as in C"),
    ("p vfs_read if (di == 3 or si == 4)", "Invalid operator 'or'", 23, "write '||', as in C"),
    ("p vfs_read if not di", "Invalid operator 'not'", 14, "write '!', as in C"),
    ("p vfs_read if (di == 3", "Too many '('", 14, "the ')' for this '(' is missing"),
    ("p vfs_read if di == 3)", "Too few '('", 21, "there is no '(' for this ')'"),
    ("p vfs_read if di * 3", "Invalid operator '*'", 17, "there is no multiplication, division or remainder"),
]


@pytest.mark.parametrize(("text", "said", "column", "hint"), TYPED)
def test_the_answer_is_about_what_was_meant(text: str, said: str, column: int, hint: str) -> None:
    with pytest.raises(SyntaxRefusedError) as caught:
        parse_definition(text)
    assert str(caught.value) == f"{said}\n    {text}\n    {' ' * column}^\n  hint: {hint}"


def test_an_argument_may_have_the_name_of_an_operator_elsewhere() -> None:
    spec = parse_definition("p vfs_read and=%di if and == 3 && 1")
    assert spec.condition is not None
    assert spec.condition.registers == {"di"}
