"""The command line: the real program, in a process of its own, with real clients."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

import trioreactor
from tests.servers import blocking_client
from trioreactor import demo
from trioreactor.cli import main

pytestmark = pytest.mark.program

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
SERVICES = ["echo", "discard", "chargen", "daytime", "time"]

each_mode = pytest.mark.parametrize("mode", ["coroutine", "dispatch"])


class Program:
    """A running ``python -m trioreactor``, by what it prints."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trioreactor", *arguments],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.first_line = self.read_line()
        found = re.search(r" listens on 127\.0\.0\.1:(\d+);", self.first_line)
        assert found, self.first_line
        self.port = int(found[1])

    def read_line(self) -> str:
        """The next line of its stdout; the test's own timeout bounds this."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        return blocking_client(self.port, receive_buffer=receive_buffer)

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGINT) -> str:
        """Signal it, and see a clean end; its last line."""
        self.send_signal(number)
        return self.ended(0)

    def ended(self, code: int) -> str:
        """Its last line, after it has ended by itself with this exit code and no complaints."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        # Not communicate(): it does not see what readline() has read ahead.
        out, errors = self.process.stdout.read(), self.process.stderr.read()
        assert (self.process.wait(20), errors) == (code, "")
        return out.splitlines()[-1]


@contextmanager
def running(*arguments: str) -> Iterator[Program]:
    """The program from its first line on; killed at the end if it still runs."""
    program = Program(*arguments)
    try:
        yield program
    finally:
        program.process.kill()
        program.process.communicate()


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(min(65536, size - len(data)))
        assert more, f"EOF after {len(data)} of {size} bytes"
        data += more
    return data


def read_to_eof(sock: socket.socket) -> bytes:
    data = b""
    while more := sock.recv(65536):
        data += more
    return data


def flood_until_stuck(sock: socket.socket) -> None:
    """Send to an echo server without reading until it takes no more: it cannot send either."""
    sock.setblocking(False)
    while select.select([], [sock], [], 0.5)[1]:
        sock.send(bytes(65536))


# -- the services


@each_mode
def test_echo(mode: str) -> None:
    """Everything comes back, and is counted both ways."""
    with running("echo", "--port", "0", "--mode", mode) as program:
        assert f"echo ({mode} mode)" in program.first_line
        with program.connect() as one, program.connect() as other:
            for sock, text in ((one, b"hello"), (other, b"world"), (one, bytes(100_000))):
                sock.sendall(text)
                assert read_exactly(sock, len(text)) == text
            one.shutdown(socket.SHUT_WR)
            assert read_to_eof(one) == b""
        last = program.end()
    assert "echo: 2 connections" in last
    assert "100010 bytes received, 100010 sent; drained in" in last


@each_mode
def test_discard(mode: str) -> None:
    """Nothing comes back, and what came is counted."""
    with running("discard", "--mode", mode) as program:
        with program.connect() as sock:
            sock.sendall(bytes(1_234_567))
            sock.shutdown(socket.SHUT_WR)
            assert read_to_eof(sock) == b""
        last = program.end()
    assert "discard: 1 connection (1 peer_eof); 1234567 bytes received, 0 sent" in last


@each_mode
def test_chargen(mode: str) -> None:
    """Lines of 72 rotate through the 95 printable characters, for as long as one reads."""
    with running("chargen", "--mode", mode) as program:
        with program.connect() as sock:
            # What clients send is thrown away.
            sock.sendall(bytes(100_000))
            lines = read_exactly(sock, 74 * 20_000).split(b"\r\n")
            for number, line in enumerate(lines[:300]):
                assert line == bytes(0x20 + (number + column) % 95 for column in range(72))
            assert lines[:-1] == (lines[:95] * 211)[: len(lines) - 1]
        last = program.end()
    assert "chargen: 1 connection" in last


@each_mode
def test_daytime(mode: str) -> None:
    """One line with the time, then EOF."""
    with running("daytime", "--mode", mode) as program, program.connect() as sock:
        line = read_to_eof(sock).decode("ascii")
        program.send_signal(signal.SIGINT)
        if mode == "dispatch":
            # It has half-closed, and waits for us to close.
            assert "draining 1 connection" in program.read_line()
        program.ended(0)
    told = datetime.strptime(line, "%A, %B %d, %Y %H:%M:%S-%Z\r\n").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - told).total_seconds()) < 60


@each_mode
def test_time(mode: str) -> None:
    """The seconds since 1900 in 32 bits, big-endian, then EOF."""
    with running("time", "--mode", mode) as program:
        with program.connect() as sock:
            word = read_to_eof(sock)
        last = program.end()
    assert len(word) == 4
    assert abs(struct.unpack("!I", word)[0] - time.time() - 2_208_988_800) < 60
    assert "0 bytes received, 4 sent" in last


# -- the end


@pytest.mark.parametrize(
    ("mode", "number"), [("coroutine", signal.SIGTERM), ("dispatch", signal.SIGINT)]
)
def test_a_signal_drains(mode: str, number: signal.Signals) -> None:
    """Clients that are connected get EOF and no reset, newcomers are refused, exit code 0."""
    with running("echo", "--mode", mode, "--drain-seconds", "30") as program:
        with program.connect() as idle, program.connect() as busy:
            idle.sendall(b"x")
            assert idle.recv(1) == b"x"
            busy.sendall(b"hello")
            assert read_exactly(busy, 5) == b"hello"
            program.send_signal(number)
            assert program.read_line() == (
                f"{number.name}: draining 2 connections, at most 30 s; once more ends at once\n"
            )
            assert idle.recv(1) == b""
            assert busy.recv(1) == b""
            last = program.ended(0)
        with pytest.raises(ConnectionRefusedError):
            program.connect()
    assert re.fullmatch(
        r"echo: 2 connections \(2 local_close\); 6 bytes received, 6 sent; "
        r"drained in \d\.\d\d s, 0 by force; ran \d+\.\d s",
        last,
    )


@each_mode
def test_a_drain_ends_the_endless(mode: str) -> None:
    """A chargen client gets what was sent before the signal, and EOF: no reset, nothing torn."""
    with running("chargen", "--mode", mode, "--drain-seconds", "30") as program:
        with program.connect() as sock:
            data = read_exactly(sock, 1_000_000)
            program.send_signal(signal.SIGTERM)
            data += read_to_eof(sock)
        last = program.ended(0)
    assert f"{len(data)} sent" in last
    # Every block of 95 lines was sent whole.
    assert len(data) % (95 * 74) == 0


def test_a_client_that_does_not_read_is_forced() -> None:
    """After --drain-seconds the rest is closed by force, which the exit code tells."""
    with (
        running("echo", "--mode", "dispatch", "--drain-seconds", "0.2") as program,
        program.connect(receive_buffer=4096) as sock,
    ):
        flood_until_stuck(sock)
        program.send_signal(signal.SIGINT)
        assert "draining 1 connection, at most 0.2 s" in program.read_line()
        last = program.ended(1)
    assert "1 drain_timeout" in last
    assert "1 by force" in last


def test_a_second_signal_ends_at_once() -> None:
    """However long the drain may take; the exit code names the signal."""
    with (
        running("echo", "--drain-seconds", "1000") as program,
        program.connect(receive_buffer=4096) as sock,
    ):
        flood_until_stuck(sock)
        program.send_signal(signal.SIGTERM)
        assert "SIGTERM: draining 1 connection" in program.read_line()
        program.send_signal(signal.SIGINT)
        last = program.ended(130)
    assert "1 forced" in last
    assert "ended at once" in last


def test_nobody_reads_the_output() -> None:
    """Whoever reads the output may go after the first line: it serves on and ends cleanly."""
    with running("echo") as program:
        assert program.process.stdout is not None
        program.process.stdout.close()
        with program.connect() as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            program.send_signal(signal.SIGINT)
            assert sock.recv(1) == b""
        assert program.process.wait(20) == 0
        assert program.process.stderr is not None
        assert program.process.stderr.read() == ""
        program.process.stdout = None


def test_verbose() -> None:
    """--verbose logs each connection's states on stderr."""
    with running("daytime", "--verbose") as program:
        with program.connect() as sock:
            read_to_eof(sock)
        program.send_signal(signal.SIGINT)
        _, errors = program.process.communicate(timeout=20)
    assert "DEBUG trioreactor.connection: daytime-127.0.0.1:" in errors
    assert "CONNECTED -> DISCONNECTING" in errors
    assert "DISCONNECTING -> DISCONNECTED" in errors


# -- what goes wrong before it begins


def test_port_in_use() -> None:
    """One line on stderr that names the address and the reason, exit code 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "trioreactor", "echo", "--port", str(port)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"trioreactor echo: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    )


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        # An address that no machine here has (RFC 5737), and two that are no names.
        ("192.0.2.1", "cannot listen on 192.0.2.1:0: Cannot assign requested address"),
        ("", "cannot listen on host '': "),
        ("a..b", "cannot listen on host 'a..b': this is no host's name"),
    ],
)
def test_bad_host(host: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, exit code 1."""
    assert main(["discard", "--host", host]) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith(f"trioreactor discard: {reason}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["echo", "--port", "65536"], "'65536' is not a port: pass 0 to 65535"),
        (["echo", "--port", "-1"], "--port"),
        (["echo", "--port", "http"], "'http' is not a port"),
        (["echo", "--mode", "threads"], "invalid choice: 'threads'"),
        (["echo", "--drain-seconds", "soon"], "'soon' is no time: pass a number of seconds"),
        (["echo", "--drain-seconds", "nan"], "'nan' is no time"),
        (["echo", "--drain-seconds=-1"], "'-1' is no time"),
        (["echo", "--bogus"], "unrecognized arguments: --bogus"),
        (["demo", "now"], "unrecognized arguments: now"),
        (["ecco"], "invalid choice: 'ecco'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr that says what to pass and where to read more, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith("trioreactor")
    assert complaint in errors
    assert "--help" in errors
    assert errors.count("\n") == 1


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command: the help, which says where to start, and exit code 2."""
    assert main([]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert "trioreactor demo" in errors
    assert all(f"\n    {service} " in errors for service in SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_help(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A service's help has its RFC, a command to try, the modes, the options, the exit codes."""
    with pytest.raises(SystemExit) as ended:
        main([service, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    port = re.search(r"try it, with --port (\d+),", text)
    assert port
    assert f"nc 127.0.0.1 {port[1]}" in text
    for word in (
        "RFC 86",
        "--port",
        "--host",
        "--drain-seconds",
        "dispatch    a callback",
        "128 + the",
    ):
        assert word in text


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before signals are handled is no traceback, in a nursery's wrapping either; with
    another error beside it, it is one.
    """

    def interrupt() -> int:
        raise error

    monkeypatch.setattr(demo, "main", interrupt)
    error: BaseException = KeyboardInterrupt()
    assert main(["demo"]) == 130
    error = BaseExceptionGroup("", [BaseExceptionGroup("", [KeyboardInterrupt()])])
    assert main(["demo"]) == 130
    error = BaseExceptionGroup("", [KeyboardInterrupt(), ValueError()])
    with pytest.raises(BaseExceptionGroup):
        main(["demo"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version names the versions that a bug report needs."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"trioreactor {trioreactor.__version__} (trio ")
