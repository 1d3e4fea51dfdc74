"""ServiceNotifier: what a service manager hears, on a socket of the test's own."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.conftest import no_leaks
from trioreactor import ServiceNotifier

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "programs" / "activated_server.py"


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.settimeout(20)
        self.variable = address.replace("\0", "@")

    def heard(self) -> dict[str, str]:
        """The next message's assignments."""
        return dict(line.split("=", 1) for line in self.sock.recv(65536).decode().split("\n"))

    def heard_nothing(self) -> bool:
        self.sock.setblocking(False)
        try:
            self.sock.recv(65536)
        except BlockingIOError:
            return True
        finally:
            self.sock.settimeout(20)
        return False

    def notifier(self, **variables: str) -> ServiceNotifier:
        return ServiceNotifier(environment={"NOTIFY_SOCKET": self.variable, **variables})


@contextmanager
def managing(address: str) -> Iterator[Manager]:
    manager = Manager(address)
    with manager.sock:
        yield manager


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """A manager with each kind of socket."""
    abstract = f"\0trioreactor-test-notify-{os.getpid()}"
    with managing(abstract if request.param == "abstract" else str(tmp_path / "n")) as manager:
        yield manager


@pytest.mark.pure
def test_messages(manager: Manager) -> None:
    """Each state is one message, as sd_notify(3) has it, with a status in one line."""
    notifier = manager.notifier()
    assert notifier.active
    assert notifier.ready()
    assert manager.heard() == {"READY": "1"}
    assert notifier.ready("12 workers")
    assert manager.heard() == {"READY": "1", "STATUS": "12 workers"}
    assert notifier.stopping("draining")
    assert manager.heard() == {"STOPPING": "1", "STATUS": "draining"}
    assert notifier.status("one\nREADY=1\r\ntwo é")
    assert manager.heard() == {"STATUS": "one READY=1 two é"}
    assert notifier.watchdog()
    assert manager.heard() == {"WATCHDOG": "1"}
    assert notifier.notify("EXTEND_TIMEOUT_USEC=5000000\nMAINPID=7")
    assert manager.heard() == {"EXTEND_TIMEOUT_USEC": "5000000", "MAINPID": "7"}
    assert manager.heard_nothing()


@pytest.mark.pure
def test_reloading_tells_the_time(manager: Manager) -> None:
    """RELOADING comes with CLOCK_MONOTONIC in microseconds, as Type=notify-reload wants it."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert manager.notifier().reloading("again")
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    heard = manager.heard()
    assert before <= int(heard.pop("MONOTONIC_USEC")) <= after
    assert heard == {"RELOADING": "1", "STATUS": "again"}


@pytest.mark.pure
@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}])
def test_nobody_to_tell(environment: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """Without the variable nothing is done, and nothing is said of it."""
    caplog.set_level(logging.DEBUG)
    notifier = ServiceNotifier(environment=environment)
    assert not notifier.active
    assert not any([notifier.ready(), notifier.reloading(), notifier.stopping()])
    assert not any([notifier.status("x"), notifier.watchdog(), notifier.notify("X=1")])
    assert not caplog.records


@pytest.mark.pure
@pytest.mark.parametrize("path", ["missing", "/x" * 100, "vsock:2:1234"])
def test_a_socket_that_is_not_there(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that cannot be used is told once, in debug, and never raised."""
    caplog.set_level(logging.DEBUG)
    address = str(tmp_path / path) if path == "missing" else path
    notifier = ServiceNotifier(environment={"NOTIFY_SOCKET": address})
    for _ in range(3):
        assert not notifier.ready()
    assert [(r.name, r.levelname) for r in caplog.records] == [("trioreactor.service", "DEBUG")]


@pytest.mark.pure
def test_a_full_socket(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    """A manager that does not read never makes us wait; once it reads, it hears again."""
    caplog.set_level(logging.DEBUG)
    notifier = manager.notifier()
    sent = 0
    begun = time.monotonic()
    while notifier.watchdog():
        sent += 1
        assert sent < 100_000
    assert not notifier.ready()
    assert time.monotonic() - begun < 10
    assert len(caplog.records) == 1
    for _ in range(sent):
        assert manager.heard() == {"WATCHDOG": "1"}
    assert notifier.ready()
    assert manager.heard() == {"READY": "1"}


@pytest.mark.pure
def test_children_do_not_speak_for_us(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables stay unless told otherwise, and the notifier works without them."""
    for name, value in (
        ("NOTIFY_SOCKET", manager.variable),
        ("WATCHDOG_USEC", "4000000"),
        ("WATCHDOG_PID", str(os.getpid())),
    ):
        monkeypatch.setenv(name, value)
    assert ServiceNotifier().active
    assert os.environ["NOTIFY_SOCKET"] == manager.variable
    notifier = ServiceNotifier(unset_environment=True)
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    assert notifier.watchdog_interval == 4
    assert notifier.ready()
    assert manager.heard() == {"READY": "1"}


@pytest.mark.pure
@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getppid())}, None),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "x"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "9" * 5000}, None),
    ],
)
def test_the_interval(variables: dict[str, str], interval: float | None) -> None:
    """It is what the manager wants of this very process, in seconds."""
    assert ServiceNotifier(environment=variables).watchdog_interval == interval


@pytest.mark.pure
async def test_the_watchdog_is_kept(
    manager: Manager, autojump_clock: trio.testing.MockClock
) -> None:
    """It is told at once and then at half of the interval; no descriptor and no task is left."""
    async with no_leaks():
        begun = trio.current_time()
        with trio.move_on_after(10):
            await manager.notifier(WATCHDOG_USEC="4000000").keep_watchdog()
        assert trio.current_time() - begun == 10
    for _ in range(5):
        assert manager.heard() == {"WATCHDOG": "1"}
    assert manager.heard_nothing()


@pytest.mark.pure
async def test_a_watchdog_that_nobody_wants(manager: Manager) -> None:
    """Without an interval, or without a socket, it ends at once, with a checkpoint."""
    for notifier in (
        manager.notifier(),
        ServiceNotifier(environment={"WATCHDOG_USEC": "4000000"}),
    ):
        with trio.testing.assert_checkpoints():
            await notifier.keep_watchdog()
    assert manager.heard_nothing()


@pytest.mark.program
def test_a_service_from_start_to_end(tmp_path: Path) -> None:
    """A real service is ready only once a client can connect, keeps its watchdog, and says that it
    stops.
    """
    with managing(str(tmp_path / "n")) as manager:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "", "127.0.0.1:0"],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "NOTIFY_SOCKET": manager.variable,
                "WATCHDOG_USEC": "100000",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            messages = [manager.heard()]
            while "READY" not in messages[-1]:
                messages.append(manager.heard())
            assert messages[-1] == {"READY": "1", "STATUS": "serving"}
            assert process.stdout is not None
            (where,) = json.loads(process.stdout.readline())["found"]["127.0.0.1:0"]
            host, _, port = where.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=20) as client:
                assert client.makefile("rb").read() == b"127.0.0.1:0\n"
            for _ in range(3):
                assert manager.heard() == {"WATCHDOG": "1"}
            process.send_signal(signal.SIGTERM)
            while "STOPPING" not in (message := manager.heard()):
                assert message == {"WATCHDOG": "1"}
            assert message == {"STOPPING": "1"}
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()
