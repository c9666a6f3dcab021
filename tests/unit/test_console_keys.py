"""What is typed at a guest's console: the guest's, but for what follows a Ctrl-A."""

from __future__ import annotations

from kprobe_guest.terminal import Keys


def test_all_keys_are_the_guests_control_characters_too() -> None:
    assert Keys().sort(b"ls\r\x03\x04\x1a\x1b[A") == (b"ls\r\x03\x04\x1a\x1b[A", b"")


def test_ctrl_a_x_ends_and_what_was_typed_before_is_sent() -> None:
    keys = Keys()
    assert keys.sort(b"poweroff\r\x01xlost") == (b"poweroff\r", b"")
    assert keys.ended


def test_a_ctrl_a_is_sent_by_typing_it_twice() -> None:
    keys = Keys()
    assert keys.sort(b"\x01\x01b\x01ac") == (b"\x01b\x01c", b"")
    assert not keys.ended


def test_the_escape_may_come_in_another_read_than_its_key() -> None:
    keys = Keys()
    assert keys.sort(b"a\x01") == (b"a", b"")
    assert keys.sort(b"x") == (b"", b"")
    assert keys.ended


def test_any_other_key_shows_the_help() -> None:
    for_guest, shown = Keys().sort(b"\x01?\x01h")
    assert for_guest == b""
    assert shown.count(b"Ctrl-A x       end the guest") == 2
