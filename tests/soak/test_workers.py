"""Worker processes under load: ended, replaced, killed, hung and stopped, many times."""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import signal
import socket
import statistics
import struct
import time
import zlib
from pathlib import Path

import pytest

from tests.servers import is_running
from tests.soak.child import running
from tests.soak.conftest import Figure
from tests.test_cli import ENVIRONMENT
from tests.test_serve_command import SERVED, Served, children, serving, until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]

WORKERS = 2
CLIENTS = 500
SIGTERMS = 50
GRACE = 0.5
CHUNK = 4096
SHORT_CONNECTIONS = 100_000
SIGHUPS = 20
KILL_SECONDS = 10
KILL_INTERVAL = 0.1


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ENVIRONMENT, "LEDGER", str(tmp_path / "ledger"))


# -- SIGTERM


def stream_of(name: bytes, size: int) -> bytes:
    """The first *size* bytes that the client of this name sends."""
    return (name * (size // 4 + 1))[:size]


class Transfer:
    """One client that sends for as long as the server takes it, and reads acknowledgements."""

    def __init__(self, number: int, port: int) -> None:
        self.name = struct.pack(">I", number)
        self.data = stream_of(self.name, CHUNK)
        self.acknowledged = 0
        self.rest = b""
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setblocking(False)
        # What of the present chunk was sent.
        self.sent = 0
        self.chunks = 0

    def work(self, events: int) -> bool:
        """Do what can be done now. False once the connection has ended."""
        try:
            if events & selectors.EVENT_READ:
                data = self.sock.recv(65536)
                if not data:
                    return False
                self.rest += data
                whole = len(self.rest) // 8 * 8
                if whole:
                    (self.acknowledged,) = struct.unpack_from(">Q", self.rest, whole - 8)
                    self.rest = self.rest[whole:]
            # Paced, or 500 would need all the processor.
            paced = self.chunks * CHUNK - self.acknowledged < CHUNK
            if events & selectors.EVENT_WRITE and paced:
                self.sent += self.sock.send(self.data[self.sent :])
                if self.sent == CHUNK:
                    self.sent = 0
                    self.chunks += 1
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


def transfer_until_the_end(served: Served, warm_up: float) -> tuple[list[Transfer], float]:
    """Have all transfer for a while, signal, and go on until all have ended. Also how long it took
    from the signal to the program's end.
    """
    transfers = [Transfer(number, served.port) for number in range(CLIENTS)]
    with selectors.DefaultSelector() as selector:
        for transfer in transfers:
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            selector.register(transfer.sock, both, transfer)
        signal_at = time.monotonic() + warm_up
        signalled = False
        ended_at = 0.0
        while selector.get_map() or not ended_at:
            if not signalled and time.monotonic() >= signal_at:
                assert min(transfer.acknowledged for transfer in transfers) > 0
                served.send_signal(signal.SIGTERM)
                signalled, signal_at = True, time.monotonic()
            if signalled and not ended_at and served.process.poll() is not None:
                ended_at = time.monotonic()
            assert time.monotonic() < signal_at + GRACE + 30
            if not selector.get_map():
                time.sleep(0.001)
                continue
            for key, events in selector.select(0.01):
                transfer = key.data
                if not transfer.work(events):
                    selector.unregister(transfer.sock)
                    transfer.sock.close()
    return transfers, ended_at - signal_at


def test_sigterm_under_load(tmp_path: Path, figure: Figure) -> None:
    """FAULTS 39: fifty times SIGTERM while 500 clients transfer. It exits within the grace and a
    second, with 0, and no byte that was acknowledged is lost (B).
    """
    ledger = Path(ENVIRONMENT["LEDGER"])
    seconds = []
    acknowledged = 0
    recorded = 0
    options = ["--workers", str(WORKERS), "--drain-seconds", str(GRACE), "--log-level", "warning"]
    for _ in range(SIGTERMS):
        ledger.write_bytes(b"")
        with serving(tmp_path, f"{SERVED}:ledger", *options) as served:
            transfers, took = transfer_until_the_end(served, 0.5)
            assert served.ended(0) == ""
        seconds.append(took)
        entries = {
            name: (size, checksum)
            for name, size, checksum in struct.iter_unpack(">4sQI", ledger.read_bytes())
        }
        assert len(entries) == CLIENTS
        for transfer in transfers:
            size, checksum = entries[transfer.name]
            assert transfer.acknowledged <= size <= transfer.chunks * CHUNK + transfer.sent
            assert checksum == zlib.crc32(stream_of(transfer.name, size))
            acknowledged += transfer.acknowledged
            recorded += size
    figure("bytes acknowledged, recorded", f"{acknowledged}, {recorded}")
    figure(
        f"s from SIGTERM to the end, grace {GRACE}",
        f"median {statistics.median(seconds):.2f}, most {max(seconds):.2f}",
    )
    assert max(seconds) <= GRACE + 1


# -- SIGHUP


@pytest.mark.parametrize("reuse", [False, True], ids=["shared", "reuse_port"])
def test_sighup_under_short_connections(reuse: bool, tmp_path: Path, figure: Figure) -> None:
    """FAULTS 56: twenty times SIGHUP while 100,000 connections come and go, and not one is refused,
    reset or left without an answer.
    """
    wanted = SHORT_CONNECTIONS // 4 if reuse else SHORT_CONNECTIONS
    hangups = SIGHUPS // 4 if reuse else SIGHUPS
    options = ["--workers", str(WORKERS)] + ["--reuse-port"] * reuse
    with (
        serving(tmp_path, f"{SERVED}:who", *options) as served,
        running("short_connections", str(served.port)) as clients,
    ):
        begun = time.monotonic()
        clients.ask("begin", wanted)
        sent = 0
        while (done := clients.ask("done"))["count"] < wanted:
            # Spread over the whole, each when the one before is complete.
            complete = served.log().count("takes the place of") == WORKERS * sent
            if sent < hangups and complete and done["count"] >= wanted * sent // (hangups + 1):
                served.send_signal(signal.SIGHUP)
                sent += 1
            time.sleep(0.05)
        took = time.monotonic() - begun
        replaced = served.log().count("takes the place of")
        served.send_signal(signal.SIGTERM)
        log = served.ended(0)
    figure("outcomes", str(done["outcomes"]))
    figure("connections/s", f"{wanted / took:.0f}")
    figure("ms for one", " ".join(f"{k} {v:.1f}" for k, v in done["ms"].items() if k != "count"))
    figure(
        "SIGHUPs, workers replaced, processes that answered",
        f"{sent}, {replaced}, {len(done['servers'])}",
    )
    assert done["outcomes"] == {"answered": wanted}
    assert sent == hangups
    assert replaced == WORKERS * hangups
    assert "ERROR" not in log


# -- kill


def test_kills(tmp_path: Path, figure: Figure) -> None:
    """FAULTS 55: workers are killed every 100 ms for ten seconds; afterwards 1,000 of 1,000
    connections are served, and there are as many workers as before.
    """
    chance = random.Random(55)
    with serving(tmp_path, f"{SERVED}:who", "--workers", "4") as served:
        end = time.monotonic() + KILL_SECONDS
        kills = 0
        while time.monotonic() < end:
            living = children(served.process.pid)
            if living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(living), signal.SIGKILL)
                    kills += 1
            time.sleep(KILL_INTERVAL)
        begun = time.monotonic()
        with running("short_connections", str(served.port)) as clients:
            clients.ask("begin", 1000)
            while (done := clients.ask("done"))["count"] < 1000:
                time.sleep(0.05)
        took = time.monotonic() - begun
        until(lambda: len(children(served.process.pid)) == 4)
        whole = time.monotonic() - begun
        assert served.process.poll() is None
        served.send_signal(signal.SIGTERM)
        served.ended(0)
    figure("kills", str(kills))
    figure(
        "served afterwards", f"{done['outcomes']} in {took:.1f} s; all workers after {whole:.1f} s"
    )
    assert done["outcomes"] == {"answered": 1000}


# -- what stands still


def test_the_supervisor_stands_still(tmp_path: Path) -> None:
    """FAULTS 57: a supervisor that was stopped for longer than a worker may hang, with the workers
    or without, ends none of them for it.
    """
    with serving(tmp_path, f"{SERVED}:who", "--workers", "2", "--hang-seconds", "2") as served:
        workers = children(served.process.pid)
        for stopped in ([served.process.pid], [served.process.pid, *workers]):
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(4)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            time.sleep(4)
        assert set(children(served.process.pid)) == set(workers)
        assert "no ping" not in served.log()
        served.send_signal(signal.SIGTERM)
        served.ended(0)


def test_an_orphan_that_hangs(tmp_path: Path) -> None:
    """A worker whose loop hangs when its supervisor is killed ends all the same."""
    options = ["--workers", "1", "--drain-seconds", "0.5"]
    with serving(tmp_path, f"{SERVED}:who", *options) as served:
        (worker,) = children(served.process.pid)
        with served.connect() as sock:
            sock.sendall(b"hang\n")
            time.sleep(0.5)
            served.process.kill()
            begun = time.monotonic()
            until(lambda: not is_running(worker))
            assert time.monotonic() - begun < 0.5 + 5 + 2
