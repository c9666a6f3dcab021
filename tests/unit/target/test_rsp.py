"""The socket client against a server that does what QEMU's stub does, and what it should not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.errors import ConnectionLostError, TargetError
from gdb_kprobe.target.rsp import RspSocket, is_served, open_socket


def test_connecting_swallows_the_unasked_stop_reply_and_reads_the_description(scripted: Any) -> None:
    with RspSocket(scripted.address) as channel:
        assert scripted.packets == [b"qSupported:multiprocess+", b"qXfer:features:read:target.xml:0,ffb"]
        scripted.answers[b"m0,1"] = b"90"
        assert channel.send(b"m0,1") == b"90"


def test_a_stub_that_does_not_greet_will_do_as_well(make_scripted: Callable[[bytes], Any]) -> None:
    scripted = make_scripted(b"")
    with RspSocket(scripted.address) as channel:
        assert channel.send(b"unknown") == b""
    scripted.close()


@pytest.mark.parametrize("news", [b"T05thread:p01.02;", b"S05"])
def test_a_stop_reply_in_between_is_not_taken_for_the_answer(scripted: Any, channel: RspSocket, news: bytes) -> None:
    scripted.answers[b"m0,1"] = [news, b"90"]
    assert channel.send(b"m0,1") == b"90"


@pytest.mark.parametrize("packet", [b"vCont;s:p1.1", b"?", b"s", b"c"])
def test_a_stop_reply_is_the_answer_of_what_resumes(scripted: Any, channel: RspSocket, packet: bytes) -> None:
    scripted.answers[packet] = b"T05thread:p01.01;"
    assert channel.send(packet) == b"T05thread:p01.01;"


@pytest.mark.parametrize(
    ("body", "payload"),
    [
        (b"plain", b"plain"),
        (b"0* ", b"0000"),
        (b"ab*!c", b"abbbbbc"),
        (b"0*~1", b"0" * 98 + b"1"),
        (b"}\x03}\x04}]}\x0a", b"#$}*"),
        (b'a}\x0ab*"', b"a*bbbbbb"),
        (b"", b""),
    ],
)
def test_escapes_and_run_lengths_are_undone(scripted: Any, channel: RspSocket, body: bytes, payload: bytes) -> None:
    scripted.answers[b"x"] = body
    assert channel.send(b"x") == payload


def test_what_is_sent_is_framed_and_escaped(scripted: Any, channel: RspSocket) -> None:
    scripted.answers[b"X}\x03}\x04}]}\x0a"] = b"OK"
    assert channel.send(b"X#$}*") == b"OK"
    body = b"X}\x03}\x04}]}\x0a"
    assert b"$%b#%02x" % (body, sum(body) & 0xFF) in scripted.raw


def test_every_reply_is_acknowledged(scripted: Any, channel: RspSocket) -> None:
    """Three at the start (the unasked one too), two for x; what y's answer gets is still on its way."""
    scripted.answers[b"x"] = [b"T02", b"OK"]
    channel.send(b"x")
    channel.send(b"y")
    assert scripted.raw.replace(b"multiprocess+", b"").partition(b"$y")[0].count(b"+") == 5


def test_a_reply_in_pieces_is_put_together(scripted: Any, channel: RspSocket) -> None:
    scripted.silent.add(b"m0,2")

    def trickle() -> None:
        while b"m0,2" not in scripted.packets:
            time.sleep(0.001)
        for byte in b"+$9090#d2":
            scripted.send_raw(bytes((byte,)))
            time.sleep(0.001)

    thread = threading.Thread(target=trickle)
    thread.start()
    assert channel.send(b"m0,2") == b"9090"
    thread.join()


# -- monitor ------------------------------------------------------------------------------------------------------


def query(command: str) -> bytes:
    return b"qRcmd," + command.encode().hex().encode()


def test_monitor_output_comes_in_packets_that_begin_with_o(scripted: Any, channel: RspSocket) -> None:
    scripted.answers[query("info x")] = [b"O" + b"first\r\n".hex().encode(), b"T02", b"O" + b"OK".hex().encode(), b"OK"]
    assert channel.monitor("info x") == "first\r\nOK"


def test_a_monitor_command_without_output_is_empty(scripted: Any, channel: RspSocket) -> None:
    scripted.answers[query("cont")] = b"OK"
    assert channel.monitor("cont") == ""


def test_a_monitor_command_that_fails_is_an_error(scripted: Any, channel: RspSocket) -> None:
    scripted.answers[query("bad")] = b"E01"
    with pytest.raises(TargetError, match="monitor command 'bad' failed: E01"):
        channel.monitor("bad")


# -- running ------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_stop_reply(scripted: Any, channel: RspSocket) -> None:
    scripted.silent.add(b"vCont;c")
    channel.resume()
    assert channel.wait_stop(0.05) is None
    scripted.send_raw(b"$T02thread:p01.01;#00")
    assert channel.wait_stop(5) == b"T02thread:p01.01;"


def test_an_interrupt_is_one_byte_outside_of_any_packet(scripted: Any, channel: RspSocket) -> None:
    channel.interrupt()
    channel.send(b"x")
    assert b"\x03$x#78" in scripted.raw


# -- the end ------------------------------------------------------------------------------------------------------


def test_detach_tells_the_stub_which_process(scripted: Any) -> None:
    channel = RspSocket(scripted.address)
    channel.detach()
    assert scripted.packets[-1] == b"D;1"


def test_a_refused_detach_is_an_error(scripted: Any) -> None:
    scripted.answers[b"D;1"] = b"E22"
    with pytest.raises(TargetError, match="would not detach: it answered b'E22'"):
        RspSocket(scripted.address).detach()


def test_a_connection_that_the_stub_closes_is_lost(scripted: Any, channel: RspSocket) -> None:
    scripted.answers[b"x"] = None
    with pytest.raises(ConnectionLostError, match="closed the connection"):
        channel.send(b"x")
    with pytest.raises(ConnectionLostError):
        channel.send(b"x")


def test_no_answer_in_time_is_a_lost_connection(scripted: Any) -> None:
    with RspSocket(scripted.address, timeout=0.1) as channel:
        for ask in (lambda: channel.send(b"x"), lambda: channel.monitor("x")):
            scripted.silent |= {b"x", query("x")}
            with pytest.raises(ConnectionLostError, match=r"no answer .* within 0.1 s\n.*another gdb"):
                ask()


def test_a_stub_that_serves_somebody_else_does_not_answer(scripted: Any, channel: RspSocket) -> None:
    """The second client's connection is taken by the kernel, and by nobody else."""
    with pytest.raises(ConnectionLostError, match="is another gdb connected"):
        RspSocket(scripted.address, timeout=0.1)
    assert channel.send(b"x") == b""


@pytest.mark.parametrize(
    "address", ["/nowhere/gdb", "unix:/nowhere/gdb", "localhost:1", "localhost:http", "tcp::1", ""]
)
def test_an_address_where_nobody_listens_is_told_with_a_hint(address: str) -> None:
    with pytest.raises(ConnectionLostError, match=r"cannot connect to the gdbstub at .*\n.*is QEMU running with -gdb"):
        RspSocket(address)


@pytest.mark.parametrize("form", ["localhost:{}", "127.0.0.1:{}", ":{}", "tcp:localhost:{}"])
def test_tcp_addresses(form: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        open_socket(form.format(server.getsockname()[1]), 5) as sock,
    ):
        assert sock.getpeername() == server.getsockname()


@pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
def test_a_stub_is_served_from_when_a_client_waits_until_it_is_let_go(tmp_path: Path, unix: bool) -> None:
    path = str(tmp_path / "stub")
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as listening:
        listening.bind(path if unix else ("127.0.0.1", 0))
        listening.listen()
        address = path if unix else f"localhost:{listening.getsockname()[1]}"
        assert not is_served(address)
        with open_socket(address, 5):
            assert is_served(address), "QEMU has not looked yet"
            accepted, _ = listening.accept()
            assert is_served(address)
        accepted.close()
        assert not is_served(address)


@pytest.mark.parametrize("address", ["192.0.2.1:1234", "| exec qemu -gdb stdio", "localhost:"])
def test_what_is_no_stub_of_this_host_is_not_known_to_be_served(address: str) -> None:
    assert not is_served(address)
