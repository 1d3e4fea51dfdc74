"""``trioreactor serve``: the real program, each of its options, and what it says when it cannot."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers import blocking_client, is_running
from tests.test_cli import ENVIRONMENT, read_exactly, read_to_eof
from trioreactor.cli import main

pytestmark = pytest.mark.program

ROOT = Path(__file__).parents[1]
SERVED = "tests.programs.served"
# Seconds for what takes a moment, on a busy machine.
PATIENCE = 30


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiled once, a program starts in half the time.
    monkeypatch.delitem(ENVIRONMENT, "PYTHONDONTWRITEBYTECODE", raising=False)


each_way = pytest.mark.parametrize("way", [[], ["--workers", "1"]], ids=["here", "workers"])


class Served:
    """A running ``python -m trioreactor serve``."""

    def __init__(
        self, directory: Path, target: str, *arguments: str, descriptors: tuple[int, ...] = ()
    ) -> None:
        if "--bind" not in arguments:
            arguments = ("--bind", "127.0.0.1:0", *arguments)
        self.log_file = directory / "log"
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trioreactor", "serve", target, *arguments],
                env=ENVIRONMENT,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                pass_fds=descriptors,
            )
        self.lines: list[str] = []
        while " listens on " not in (line := self.read_line()):
            assert line, self.log()
            self.lines.append(line)
        self.first_line = line
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        self.port = int(found[1]) if found else 0

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def log(self) -> str:
        return self.log_file.read_text()

    def wait_log(self, text: str) -> re.Match[str]:
        """Wait until the log has it: a regular expression."""
        found: list[re.Match[str]] = []

        def has() -> bool:
            found.extend(re.finditer(text, self.log()))
            return bool(found)

        until(has)
        return found[0]

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        return blocking_client(self.port, receive_buffer=receive_buffer)

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, code: int) -> str:
        """Its log, after it has ended with this exit code."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().splitlines()
        assert self.process.wait(PATIENCE) == code, self.log()
        return self.log()


@contextmanager
def serving(
    directory: Path, target: str = "echo", *arguments: str, descriptors: tuple[int, ...] = ()
) -> Iterator[Served]:
    """The program once it serves; killed at the end if it still runs."""
    target = target if ":" in target else f"{SERVED}:{target}"
    served = Served(directory, target, *arguments, descriptors=descriptors)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.communicate()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def answers(sock: socket.socket, text: bytes = b"hello") -> bool:
    """Whether an echo server is on the other side."""
    sock.sendall(text)
    return read_exactly(sock, len(text)) == text


def pid_of(served: Served) -> int:
    """The worker's that a new connection gets to, of `who`."""
    with served.connect() as sock:
        sock.sendall(b"who\n")
        return int(read_exactly(sock, 2).decode() + sock.makefile().readline())


def children(pid: int) -> list[int]:
    """The processes that *pid* has started and that have not ended."""
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
        if is_running(int(child))
    ]


def processor_seconds(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


# -- what it serves, and its end


@each_way
def test_signals(way: list[str], tmp_path: Path) -> None:
    """SIGUSR1 writes every connection and every task, and where it waits. SIGHUP replaces workers,
    and ends nothing where there are none. SIGTERM and SIGINT drain: newcomers are refused, who is
    there is served to the end, exit code 0.
    """
    with serving(tmp_path, "echo", *way) as served:
        how = "1 worker; " if way else ""
        assert served.first_line == (
            f"{SERVED}:echo listens on 127.0.0.1:{served.port}; {how}Ctrl-C drains and ends it\n"
        )
        with served.connect() as sock:
            assert answers(sock)
            served.send_signal(signal.SIGUSR1)
            peer = f"127.0.0.1:{sock.getsockname()[1]}"
            served.wait_log(
                f"connection echo-.*#1 from {peer}; CONNECTED; 5 bytes received, 5 sent"
            )
            served.wait_log(r"task [. ]*echo-.*#1: .*< echo \(served.py:\d+\)")
            if way:
                served.wait_log("all workers: 1 opened, 1 active; closed: none; 5 bytes received")
            served.send_signal(signal.SIGHUP)
            served.wait_log("takes the place of" if way else "no worker processes here")
            assert answers(sock)
            with served.connect() as other:
                assert answers(other)
            if way:
                # As systemd does: every process of the service.
                for worker in children(served.process.pid):
                    os.kill(worker, signal.SIGTERM)
            served.send_signal(signal.SIGINT if way else signal.SIGTERM)
            served.wait_log("draining, at most 25 s; once more ends at once")
            until(lambda: is_refused(served))
            assert answers(sock)
            sock.shutdown(socket.SHUT_WR)
            assert read_to_eof(sock) == b""
        log = served.ended(0)
    assert ", 0 were closed by force" in log
    assert served.lines == []


def is_refused(served: Served) -> bool:
    try:
        served.connect().close()
    except ConnectionRefusedError:
        return True
    return False


@each_way
def test_a_second_signal_ends_at_once(way: list[str], tmp_path: Path) -> None:
    """However long the drain may take, and even if a handler holds on to its life."""
    with serving(tmp_path, "stubborn", *way) as served, served.connect() as sock:
        assert sock.recv(1) == b"x"
        served.send_signal(signal.SIGTERM)
        served.wait_log("SIGTERM: draining")
        begun = time.monotonic()
        served.send_signal(signal.SIGINT)
        assert "SIGINT: ending at once" in served.ended(130)
        assert time.monotonic() - begun < 5


def test_the_supervisor_is_killed(tmp_path: Path) -> None:
    """Its workers end by themselves: clients are served to the end, and nobody is left. Until then,
    with nothing to do, both need next to no processor: S.
    """
    with serving(tmp_path, "who", "--workers", "1") as served, served.connect() as sock:
        sock.sendall(b"who\n")
        worker = int(sock.makefile().readline())
        before = processor_seconds(worker) + processor_seconds(served.process.pid)
        time.sleep(0.5)
        after = processor_seconds(worker) + processor_seconds(served.process.pid)
        assert after - before < 0.02
        served.process.kill()
        served.wait_log("the supervisor is gone: draining")
        assert sock.recv(1) == b""
        until(lambda: not is_running(worker))


# -- options


def test_bind(tmp_path: Path) -> None:
    """Several addresses: TCP, a Unix socket, and a descriptor."""
    path = tmp_path / "x.sock"
    with socket.create_server(("127.0.0.1", 0)) as inherited:
        fd = inherited.fileno()
        binds = ["127.0.0.1:0", f"unix:{path}", f"fd://{fd}"]
        arguments = [part for bind in binds for part in ("--bind", bind)]
        with serving(tmp_path, "echo", *arguments, descriptors=(fd,)) as served:
            for family, address in (
                (socket.AF_INET, ("127.0.0.1", served.port)),
                (socket.AF_UNIX, str(path)),
                (socket.AF_INET, inherited.getsockname()),
            ):
                with socket.socket(family) as sock:
                    sock.settimeout(PATIENCE)
                    sock.connect(address)
                    assert answers(sock)
            served.send_signal(signal.SIGTERM)
            served.ended(0)
    assert not path.exists()


def test_limits(tmp_path: Path) -> None:
    """One more than there may be is turned away."""
    options = ["--max-connections", "1", "--when-full", "reject"]
    with serving(tmp_path, "echo", *options) as served, served.connect() as sock:
        assert answers(sock)
        with served.connect() as other:
            assert other.recv(1) == b""
        served.send_signal(signal.SIGUSR1)
        served.wait_log("1 rejected by connections")


def test_limits_of_peers_and_time(tmp_path: Path) -> None:
    """So many from one address, and so many a second: then the next has to wait."""
    with serving(tmp_path, "echo", "--max-per-peer", "1", "--accept-rate", "8") as served:
        begun = time.monotonic()
        for _ in range(6):
            with served.connect() as sock:
                assert answers(sock)
                with served.connect() as other:
                    assert other.recv(1) == b""
                # The next one may come only when this one has gone.
                sock.shutdown(socket.SHUT_WR)
                assert read_to_eof(sock) == b""
        # Eight at once, and four more.
        assert 0.4 < time.monotonic() - begun < PATIENCE
        served.send_signal(signal.SIGUSR1)
        served.wait_log("6 rejected by per_peer")


def test_waits_when_full_and_drain_seconds(tmp_path: Path) -> None:
    """Unless told otherwise, newcomers wait until there is room. Who has not ended within the grace
    is cut off, which the log says; the exit code is 0 all the same. In debug, the log has every
    connection's life; a line for each event. What the program opens before it serves is closed
    after it has.
    """
    options = ["--max-connections", "1", "--drain-seconds", "0.3", "--log-level", "debug"]
    with serving(tmp_path, "context", *options) as served, served.connect() as sock:
        assert answers(sock)
        with served.connect() as other:
            other.sendall(b"hello")
            assert select.select([other], [], [], 0.2)[0] == []
            sock.close()
            assert read_exactly(other, 5) == b"hello"
            begun = time.monotonic()
            served.send_signal(signal.SIGTERM)
            log = served.ended(0)
            assert 0.3 <= time.monotonic() - begun < 0.3 + 5
    assert "0 connections ended, 1 were closed by force" in log
    assert "CONNECTED -> DISCONNECT" in log
    assert [line.strip() for line in served.lines] == ["opened", "closed"]
    form = rf"\d{{4}}-\d\d-\d\d [\d:,]+ [A-Z]+ \[{served.process.pid}\] [\w.]+: .+"
    assert all(re.fullmatch(form, line) for line in log.splitlines())


def test_reload(tmp_path: Path) -> None:
    """A source file that changes replaces the worker; one that is broken does not, until it is
    mended.
    """
    program = tmp_path / "app.py"
    program.write_text("from tests.programs.served import echo as handler\n")
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "PYTHONPATH", path)
        with serving(tmp_path, "app:handler", "--reload") as served:
            with served.connect() as sock:
                assert answers(sock)
            program.write_text("async def handler(conn:\n")
            served.wait_log(r"importing 'app' failed: SyntaxError: .*: worker 1 .* serves on")
            with served.connect() as sock:
                assert answers(sock)
            program.write_text("async def handler(conn):\n    await conn.send_all(b'new')\n")
            served.wait_log("takes the place of")
            with served.connect() as sock:
                assert read_to_eof(sock) == b"new"
            served.send_signal(signal.SIGTERM)
            served.ended(0)


def test_workers_hang_seconds_reuse_port_watchdog(tmp_path: Path) -> None:
    """So many workers serve, each on a socket of its own. Of one that is held up for a while the
    log has the stack; one that hangs is replaced.
    """
    options = ["--workers", "2", "--reuse-port", "--hang-seconds", "0.5", "--watchdog", "0.2"]
    with serving(tmp_path, "who", *options) as served:
        pids: set[int] = set()
        until(lambda: len(pids.add(pid_of(served)) or pids) == 2)
        with served.connect() as sock:
            sock.sendall(b"hold\nhang\n")
            served.wait_log("trioreactor.watchdog: (.*\n)*?.*served.py.*who")
            served.wait_log("has answered no ping for 0.5 s: ending it")
            served.wait_log("Current thread .*\n.*served.py")
            served.wait_log(r"was ended by SIGABRT, after [\d.]+ s; starting another")
            # The answer to the first.
            assert read_to_eof(sock).count(b"\n") == 1
        until(lambda: pid_of(served) not in pids)
        served.send_signal(signal.SIGTERM)
        served.ended(0)


# -- what goes wrong before it begins


def test_port_in_use(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the address and the reason, exit code 1; no worker is started for it."""
    monkeypatch.chdir(ROOT)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        for way in ([], ["--workers", "1"]):
            assert main(["serve", f"{SERVED}:echo", "--bind", bind, *way]) == 1
            reason = f"cannot listen on {bind}: Address already in use"
            errors = capsys.readouterr().err
            assert errors.splitlines()[-1] == f"trioreactor serve: {reason}"
            assert "worker 1" not in errors


def test_cannot_start() -> None:
    """A program that fails: its traceback, and a line with the reason; nothing on stdout."""
    done = run("raising", "--workers", "1")
    assert (done.returncode, done.stdout) == (1, "")
    reason = f"calling '{SERVED}:raising' failed: RuntimeError: out of order"
    assert done.stderr.splitlines()[-1] == f"trioreactor serve: {reason}"
    assert 'served.py", line' in done.stderr
    assert "importlib" not in done.stderr


def run(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if "--bind" not in arguments:
        arguments = ("--bind", "127.0.0.1:0", *arguments)
    return subprocess.run(
        [sys.executable, "-m", "trioreactor", "serve", f"{SERVED}:{target}", *arguments],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nonesuch:handler"], "cannot import 'nonesuch': there is no module 'nonesuch' in "),
        ([f"{SERVED}.more:x"], f"cannot import '{SERVED}.more': there is no module '{SERVED}."),
        ([f"{SERVED}:nonesuch"], "served.py has no 'nonesuch'\n"),
        ([f"{SERVED}:number"], f"'{SERVED}:number' is 3: name an async function, Callbacks, or"),
        ([f"{SERVED}:server"], "name an async function, Callbacks, or a function that takes"),
        ([f"{SERVED}:no_server"], "gave 3 and no TcpServer: return TcpServer(handler, **options)"),
        (
            [f"{SERVED}:deaf"],
            "which does not listen where it is asked to: return TcpServer(handler",
        ),
        ([f"{SERVED}:raising"], f"calling '{SERVED}:raising' failed: RuntimeError: out of order\n"),
        ([f"{SERVED}:closed_context"], "failed: RuntimeError: no database\n"),
        ([f"{SERVED}:empty_context"], "gave 3 and no TcpServer"),
        ([f"{SERVED}:echo", "--bind", "a..b:0"], "cannot listen on a..b:0: "),
        (
            [f"{SERVED}:echo", "--bind", "192.0.2.1:0"],
            "cannot listen on 192.0.2.1:0: Cannot assign",
        ),
        ([f"{SERVED}:echo", "--bind", "fd://99"], "descriptor 99: it is not open"),
        ([f"{SERVED}:echo", "--bind", "unix:/nonesuch/x"], "cannot listen on /nonesuch/x: No such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_reasons(
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last line on stderr says why it cannot begin; exit code 1."""
    monkeypatch.chdir(ROOT)
    if "--bind" not in arguments:
        arguments = [*arguments, "--bind", "127.0.0.1:0"]
    assert main(["serve", *arguments]) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    last = errors.splitlines(keepends=True)[-1]
    assert last.startswith("trioreactor serve: ")
    assert reason in last


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: TARGET"),
        (["app"], "'app' names nothing to serve: pass \"module:attribute\""),
        (["app:"], "names nothing to serve"),
        (["../app:handler"], "names nothing to serve"),
        (["a:h", "--bind", "7000"], "bind address '7000': pass host:port"),
        (["a:h", "--bind", "[::1:7000"], "bind address"),
        (["a:h", "--workers", "0"], "'0' does not count anything: pass a whole number of at"),
        (["a:h", "--workers", "two"], "'two' does not count anything"),
        (["a:h", "--max-connections", "-1"], "--max-connections"),
        (["a:h", "--accept-rate", "0"], "'0' lets nobody in"),
        (["a:h", "--when-full", "cry"], "invalid choice: 'cry'"),
        (["a:h", "--drain-seconds", "soon"], "'soon' is no time"),
        (["a:h", "--hang-seconds", "inf"], "'inf' is no time"),
        (["a:h", "--accept-rate", "nan"], "'nan' is no rate: pass a number of connections"),
        (["a:h", "--watchdog", "0.001"], "'0.001' is too short to be seen: pass at least 0.01"),
        (["a:h", "--log-level", "loud"], "invalid choice: 'loud'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr that says what to pass and where to read more, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith("trioreactor serve: ")
    assert complaint in errors
    assert "--help" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tls-key", "x"], "--tls-key and --tls-ca want a --tls-cert"),
        (["--tls-ca", "x", "--proxy-protocol", "any"], "--tls-key and --tls-ca want a --tls-cert"),
        (
            ["--proxy-protocol", "any", "--proxy-protocol", "10.0.0.0/8"],
            "--proxy-protocol any believes whoever connects: leave it or the networks out",
        ),
        (["--reuse-port"], "--reuse-port and --hang-seconds are for worker processes: they want"),
        (["--hang-seconds", "5"], "--reuse-port and --hang-seconds are for worker processes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is right, and together they are not: one line that says which, exit code 2."""
    assert main(["serve", "a:h", *arguments]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith(f"trioreactor serve: {complaint}")
    assert errors.endswith("(see trioreactor serve --help)\n")
    assert errors.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """It teaches: what a target is, a program to try, the signals, the exit codes."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("async def handler(conn)", "TcpServer(handler, **options", "SIGHUP", "SIGUSR1"):
        assert word in text
    for word in ("nc 127.0.0.1 7000", "fd://3", "128 + the", "in each of them"):
        assert word in text
