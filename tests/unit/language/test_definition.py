"""The probe definition language: what each form means, and where and why a wrong one is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdb_kprobe.errors import SyntaxRefusedError
from gdb_kprobe.language.condition import parse_condition
from gdb_kprobe.language.definition import FetchArg, FetchType, Location, ProbeSpec, parse_definition
from gdb_kprobe.language.expression import Cast, Register
from gdb_kprobe.model import PT_REGS_NAMES, VirtAddr


def test_all_of_it_at_once() -> None:
    text = "p:mine/open do_sys_openat2+0x4 dfd=%di:s32 %si how=%dx:x16 if dfd == -100 && si != 0"
    spec = parse_definition(text)
    assert spec == ProbeSpec(
        name="open",
        location=Location("do_sys_openat2", offset=4),
        group="mine",
        args=(
            FetchArg("dfd", "di", FetchType.S32),
            FetchArg("arg2", "si", FetchType.X64),
            FetchArg("how", "dx", FetchType.X16),
        ),
        condition=parse_condition("dfd == -100 && si != 0", {"dfd": Cast(Register("di"), 32, is_signed=True)}),
        text=text,
    )


@pytest.mark.parametrize(
    ("text", "location", "name"),
    [
        ("p vfs_read", Location("vfs_read"), "p_vfs_read_0"),
        ("p vfs_read+16", Location("vfs_read", offset=16), "p_vfs_read_16"),
        ("p vfs_read+0x10", Location("vfs_read", offset=16), "p_vfs_read_16"),
        ("p vfs_read+010", Location("vfs_read", offset=8), "p_vfs_read_8"),
        ("p vfs_read-4", Location("vfs_read", offset=-4), "p_vfs_read_m4"),
        ("p vfs_read+4294967295", Location("vfs_read", offset=0xFFFF_FFFF), "p_vfs_read_4294967295"),
        ("p ext4:ext4_sync_fs", Location("ext4_sync_fs", "ext4"), "p_ext4_ext4_sync_fs_0"),
        ("p nosuchmod:func+1", Location("func", "nosuchmod", 1), "p_nosuchmod_func_1"),
        ("p foo.isra.0", Location("foo.isra.0"), "p_foo_isra_0_0"),
        ("p foo.cold+2", Location("foo.cold", offset=2), "p_foo_cold_2"),
        ("p 0xFFFFFFFF81234567", Location(address=VirtAddr(0xFFFF_FFFF_8123_4567)), "p_0xffffffff81234567"),
        ("p 4096", Location(address=VirtAddr(4096)), "p_0x1000"),
        ("p 010", Location(address=VirtAddr(8)), "p_0x8"),
        ("p if", Location("if"), "p_if_0"),
        ("p " + "a" * 100, Location("a" * 100), "p_" + "a" * 61),
    ],
)
def test_places_and_the_names_that_they_give(text: str, location: Location, name: str) -> None:
    spec = parse_definition(text)
    assert (spec.location, spec.name, spec.group) == (location, name, "kprobes")


@pytest.mark.parametrize(
    ("text", "group", "name"),
    [
        ("p:open f", "kprobes", "open"),
        ("p:grp/open f", "grp", "open"),
        ("p:grp.open f", "grp", "open"),
        ("p:my-grp/open f", "my-grp", "open"),
        ("p:grp/ f", "grp", "p_f_0"),
        ("p:" + "n" * 63 + " f", "kprobes", "n" * 63),
        ("p:" + "g" * 63 + "/n f", "g" * 63, "n"),
    ],
)
def test_groups_and_names(text: str, group: str, name: str) -> None:
    spec = parse_definition(text)
    assert (spec.group, spec.name) == (group, name)


@pytest.mark.parametrize("register", PT_REGS_NAMES)
def test_every_register_of_pt_regs_can_be_fetched(register: str) -> None:
    assert parse_definition(f"p f %{register}").args == (FetchArg("arg1", register),)


@pytest.mark.parametrize("type_", list(FetchType))
def test_every_integer_type_can_be_given(type_: FetchType) -> None:
    assert parse_definition(f"p f x=%di:{type_}").args == (FetchArg("x", "di", type_),)


def test_white_space_and_a_comment_do_not_matter() -> None:
    text = "  p:n\tf   x=%di   if x ==\t1  # the first argument"
    spec = parse_definition(text)
    assert str(spec) == "p:kprobes/n f x=%di if x == 1"
    assert spec.text == text.strip()


def test_an_argument_named_like_a_register_hides_it_but_not_with_a_percent_sign() -> None:
    condition = parse_definition("p f si=%di if si == 1 && %si == 2").condition
    assert condition is not None
    assert condition.evaluate({"di": 1, "si": 2})
    assert not condition.evaluate({"di": 2, "si": 1})


def test_an_argument_in_a_condition_has_the_sign_of_its_type() -> None:
    for type_, holds in (("s32", True), ("u32", False), ("x32", False)):
        condition = parse_definition(f"p f fd=%di:{type_} if fd < 0").condition
        assert condition is not None
        assert condition.evaluate({"di": 0xFFFF_FF9C}) is holds


@pytest.mark.parametrize(
    ("type_", "raw", "value"),
    [
        (FetchType.U8, 0x1FF, 255),
        (FetchType.S8, 0x180, -128),
        (FetchType.S8, 0x17F, 127),
        (FetchType.X16, 0x12345, 0x2345),
        (FetchType.S32, 0xFFFF_FF9C, -100),
        (FetchType.U32, 0xFFFF_FFFF_FFFF_FF9C, 0xFFFF_FF9C),
        (FetchType.S64, 1 << 63, -(1 << 63)),
        (FetchType.U64, (1 << 64) - 1, (1 << 64) - 1),
        (FetchType.S32, -100, -100),
    ],
)
def test_types_cut_to_size(type_: FetchType, raw: int, value: int) -> None:
    assert type_.extract(raw) == value


# -- refusals ----------------------------------------------------------------------------------------------------------

# The caret of the second line stands under the column that the error must name.
REFUSED = [
    ("", "the definition is empty", "^"),
    ("# only a comment", "the definition is empty", "^"),
    ("p", "no probe point is given", " ^"),
    ("p:name", "no probe point is given", "      ^"),
    ("x f", "'x' is not a type of probe", "^"),
    ("pxyz f", "'pxyz' is not a type of probe", "^"),
    ("vfs_read", "'vfs_read' is not a type of probe", "^"),
    ("p10 f", "Maxactive is only for function exit", " ^"),
    ("r:n f", "not implemented yet: return probes", "^"),
    ("r10 f", "not implemented yet: return probes", "^"),
    ("-:n", "not implemented yet: deleting by a definition", "^"),
    # places
    ("p f%return", "not implemented yet: return probes", "   ^"),
    ("p f%exit", "Invalid probed address suffix", "   ^"),
    ("p f+", "Invalid probed address or symbol", "   ^"),
    ("p f+x", "Invalid probed address or symbol", "   ^"),
    ("p f+4294967296", "Invalid probed address or symbol", "   ^"),
    ("p f+08", "Invalid probed address or symbol", "   ^"),
    ("p f+1+2", "Invalid probed address or symbol", "   ^"),
    ("p +4", "Invalid probed address or symbol", "  ^"),
    ("p 0x10000000000000000", "Invalid probed address or symbol", "  ^"),
    ("p 0xfoo", "Invalid probed address or symbol", "  ^"),
    ("p 12f", "Invalid probed address or symbol", "  ^"),
    ("p f,g", "Invalid probed address or symbol", "  ^"),
    ("p :f", "Invalid probed address or symbol", "  ^"),
    ("p m:", "Invalid probed address or symbol", "  ^"),
    ("p a:b:c", "Invalid probed address or symbol", "  ^"),
    ("p nf-nat:f", "Invalid probed address or symbol", "  ^"),
    # names
    ("p: f", "Event name is not specified", "  ^"),
    ("p:/n f", "Group name is not specified", "  ^"),
    ("p:1n f", "Event name must follow the same rules as C identifiers", "  ^"),
    ("p:a-b f", "Event name must follow the same rules as C identifiers", "  ^"),
    ("p:g/1n f", "Event name must follow the same rules as C identifiers", "    ^"),
    ("p:1g/n f", "Group name must follow the same rules as C identifiers", "  ^"),
    ("p:g/h/n f", "Event name must follow the same rules as C identifiers", "    ^"),
    ("p:" + "n" * 64 + " f", "Event name is too long", "  ^"),
    ("p:" + "g" * 64 + "/n f", "Group name is too long", "  ^"),
    # arguments
    ("p f =%di", "Argument name is not specified", "    ^"),
    ("p f x=", "No argument expression", "      ^"),
    ("p f 1x=%di", "Argument name must follow the same rules as C identifiers", "    ^"),
    ("p f " + "x" * 33 + "=%di", "Argument name is too long", "    ^"),
    ("p f x=" + "%" * 64, "Argument expression is too long", "      ^"),
    ("p f x=%di x=%si", "This argument name is already used", "          ^"),
    ("p f arg2=%di %si", "This argument name is already used", "             ^"),
    ("p f common_pid=%di", "This argument name is already used", "    ^"),
    ("p f __probe_ip=%di", "This argument name is already used", "    ^"),
    ("p f x=%rdi", "Invalid register name", "      ^"),
    ("p f %rdi", "Invalid register name", "    ^"),
    ("p f %", "Invalid register name", "    ^"),
    ("p f x=%di:", "Unknown type is specified", "          ^"),
    ("p f x=%di:u7", "Unknown type is specified", "          ^"),
    ("p f x=%di:u32:u32", "Unknown type is specified", "          ^"),
    ("p f $retval", "$retval is not available on probe", "    ^"),
    ("p f $nothing", "Invalid $-variable specified", "    ^"),
    ("p f x=10", "Invalid fetch argument", "      ^"),
    ("p f di", "Invalid fetch argument", "    ^"),
    # what the kernel has and this has not yet
    ("p f x=+0(%si)", "not implemented yet: fetching from memory, +OFFSET(...)", "      ^"),
    ("p f x=-8(%bp):u32", "not implemented yet: fetching from memory, +OFFSET(...)", "      ^"),
    ("p f x=+u0(%si):ustring", "not implemented yet: fetching from memory, +OFFSET(...)", "      ^"),
    ("p f x=@jiffies", "not implemented yet: fetching from memory, @SYMBOL or @ADDRESS", "      ^"),
    ("p f $stack", "not implemented yet: $stack", "    ^"),
    ("p f $stack3", "not implemented yet: $stack3", "    ^"),
    ("p f $comm", "not implemented yet: $comm", "    ^"),
    ("p f $arg1", "not implemented yet: $arg1", "    ^"),
    ("p f $arg*", "not implemented yet: $arg*", "    ^"),
    ("p f \\1", "not implemented yet: immediate values", "    ^"),
    ("p f file", "not implemented yet: arguments by the function's parameter names", "    ^"),
    ("p f x=%orig_ax", "not implemented yet: %orig_ax", "      ^"),
    ("p f x=%di:string", "not implemented yet: type string", "          ^"),
    ("p f x=%di:char", "not implemented yet: type char", "          ^"),
    ("p f x=%di:symbol", "not implemented yet: type symbol", "          ^"),
    ("p f x=%di:b4@8/32", "not implemented yet: type b4@8/32", "          ^"),
    ("p f x=%di:u8[4]", "not implemented yet: type u8[4]", "          ^"),
    # the condition
    ("p f if", "Meaningless filter expression", "      ^"),
    ("p f x=%di if y == 1", "Field not found", "             ^"),
    ("p f if di == 1 if si == 1", "Invalid operator", "               ^"),
    ("p f if di == 1 x=%di", "Invalid operator", "                ^"),
    # the order is the kernel's: place, names, arguments
    ("p:1n 1f %rdi", "Invalid probed address or symbol", "     ^"),
    ("p:1n f %rdi", "Event name must follow the same rules as C identifiers", "  ^"),
]


@pytest.mark.parametrize(("text", "message", "caret"), REFUSED, ids=[text[:30] or "empty" for text, _, _ in REFUSED])
def test_refused(text: str, message: str, caret: str) -> None:
    with pytest.raises(SyntaxRefusedError) as caught:
        parse_definition(text)
    error = caught.value
    assert error.message.splitlines()[0] == message
    assert error.column == caret.index("^")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("p f %rdi", "did you mean %di?"),
        ("p f %edi", "did you mean %di?"),
        ("p f %dil", "did you mean %di?"),
        ("p f %al", "did you mean %ax?"),
        ("p f %r8d", "did you mean %r8?"),
        ("p f %rip", "did you mean %ip?"),
        ("p f %eflags", "did you mean %flags?"),
        ("p f %DI", "did you mean %di?"),
        ("p f %flag", "did you mean %flags?"),
        ("p f di", "did you mean %di?"),
        ("p f x=%di:s23", "did you mean s32?"),
        ("p f x=+0(%si)", "for now an argument is a register, such as name=%di:s32"),
        ("p nf-nat:f", "the kernel writes module names with '_': nf_nat:f"),
        ("p f if rdi == 1", "did you mean 'di'?"),
        ("p f dfd=%di if dfs == 1", "did you mean 'dfd'?"),
        ("p f dfd=%di if name == 1", "arguments: dfd; registers are named as in struct pt_regs: di, si, ip, flags"),
        ("p f if x == 1 y=%di", "arguments come before 'if'"),
        ("p f if di = 1", "equality is '=='"),
        ("p: f", "leave out the ':' for an automatic name"),
    ],
)
def test_hints_name_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(SyntaxRefusedError) as caught:
        parse_definition(text)
    assert caught.value.hint == hint


def test_the_whole_error_as_it_is_shown() -> None:
    with pytest.raises(SyntaxRefusedError) as caught:
        parse_definition("p:open\tvfs_open dfd=%rdi")
    assert str(caught.value) == (
        "Invalid register name\n"
        "    p:open vfs_open dfd=%rdi\n"
        "                        ^\n"
        "  hint: did you mean %di?"
    )  # fmt: skip


@pytest.mark.parametrize("junk", ["\n", "\x00", "é", "\x7f"])
def test_what_is_not_one_line_of_ascii_is_refused_where_it_is(junk: str) -> None:
    with pytest.raises(SyntaxRefusedError) as caught:
        parse_definition(f"p f{junk}x=%di")
    assert caught.value.column == 3
    assert caught.value.message.endswith("p f?x=%di\n       ^")


def test_too_long_a_line_is_refused() -> None:
    parse_definition("p f" + " " * 4091)
    with pytest.raises(SyntaxRefusedError, match="the definition is too long"):
        parse_definition("p f" + " " * 4092)


def test_too_many_arguments_are_refused() -> None:
    assert len(parse_definition("p f" + " %di" * 128).args) == 128
    with pytest.raises(SyntaxRefusedError, match="too many arguments"):
        parse_definition("p f" + " %di" * 129)


# -- properties --------------------------------------------------------------------------------------------------------

identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True)
locations = st.one_of(
    st.builds(
        Location,
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,20}", fullmatch=True),
        st.one_of(st.just(""), identifiers),
        st.integers(-0xFFFF_FFFF, 0xFFFF_FFFF),
    ),
    st.builds(Location, address=st.integers(0, 2**64 - 1).map(VirtAddr)),
)
args = st.lists(
    st.builds(FetchArg, identifiers, st.sampled_from(sorted(PT_REGS_NAMES)), st.sampled_from(list(FetchType))),
    max_size=4,
    unique_by=lambda arg: arg.name,
).map(tuple)
conditions = st.one_of(st.none(), st.just("di == 1"), st.just("%si < %di && flags & 0x200")).map(
    lambda text: None if text is None else parse_condition(text)
)


@given(st.builds(ProbeSpec, identifiers, locations, identifiers, args, conditions))
def test_the_text_of_a_definition_means_the_definition(spec: ProbeSpec) -> None:
    again = parse_definition(str(spec))
    assert str(again) == str(spec)
    assert (again.name, again.group, again.location, again.args) == (spec.name, spec.group, spec.location, spec.args)


alphabet = st.sampled_from([*"p:/.-+%@$=#()0x19afgdi_ \t", "if ", "%di", "u32", "->", "é", "\n"])


@given(st.lists(alphabet, max_size=40).map("".join))
def test_whatever_is_written_is_a_probe_or_a_refusal_with_a_column(text: str) -> None:
    for definition in (text, f"p {text}", f"p f {text}", f"p f if {text}"):
        try:
            parse_definition(definition)
        except SyntaxRefusedError as error:
            assert 0 <= error.column <= len(definition)  # noqa: PT017 - most texts are refused, some are not
