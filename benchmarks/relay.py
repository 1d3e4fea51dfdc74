"""Throughput and CPU of a TCP relay: examples/tcprelay.py in both modes beside socat, in one run.

Each relay has the first core; a source and a sink, which hardly touch their bytes, share the last.
"direct" is the two without a relay, to show that they are not what is measured; "of a core" is
how busy the relay was. The rounds are interleaved, so that a disturbance of the machine meets all,
and the medians are compared.

    python benchmarks/relay.py [--connections 1 8] [--seconds 1.5] [--rounds 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from ctypes import Array, c_ulonglong
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import trio

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tcprelay.py"
OURS = ("trioreactor dispatch", "trioreactor coroutine")
# Its own block size is 8 KiB; one read of ours is 64 KiB.
SOCAT = {"socat": [], "socat -b 65536": ["-b", "65536"]}

MOST_CONNECTIONS = 64
FILE_SIZE = 2**24
# For a connection to get going, and for relays to forget those of the round before.
SETTLE = 0.3
PATIENCE = 20.0

processes = multiprocessing.get_context("spawn")
Counters = Array[c_ulonglong]


def pour(port: int, connections: int, core: int | None, path: str) -> None:
    """Connect so often and send a file on each, over and over, until killed."""
    pin(core)

    def run(sock: socket.socket) -> None:
        with open(path, "rb") as file:
            while True:
                os.sendfile(sock.fileno(), file.fileno(), 0, FILE_SIZE)

    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
    threads = [threading.Thread(target=run, args=(sock,)) for sock in socks]
    for thread in threads:
        thread.start()


def swallow(parent: Connection, counters: Counters, core: int | None) -> None:
    """Tell a port; drop what comes there and count it, until killed."""
    pin(core)

    def run(sock: socket.socket, slot: int) -> None:
        buffer = bytearray(2**20)
        with sock, suppress(ConnectionError):
            # MSG_TRUNC: the kernel drops the bytes itself.
            while n := sock.recv_into(buffer, len(buffer), socket.MSG_TRUNC):
                counters[slot] += n

    with socket.create_server(("127.0.0.1", 0), backlog=MOST_CONNECTIONS) as listener:
        parent.send(listener.getsockname()[1])
        slot = 0
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=run, args=(sock, slot % MOST_CONNECTIONS)).start()
            slot += 1


def pin(core: int | None) -> None:
    """Keep this process on one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


@dataclass
class Round:
    """What one round of one relay gave."""

    rate: float
    """Megabytes a second."""
    cpu: float
    """Seconds of the relay's CPU (user and system) per GiB."""
    share: float
    """Of a core, how much the relay used."""


class Relay:
    """A relay's process, on the first core, and those that it makes."""

    def __init__(self, name: str, target: int, core: int | None) -> None:
        self.name = name
        self.port = target
        self.process: subprocess.Popen[str] | None = None
        if name in OURS:
            command = [sys.executable, str(EXAMPLE), "--port=0", f"--target=127.0.0.1:{target}"]
            command += ["--mode", name.split()[1]]
        elif name in SOCAT:
            # It cannot tell a port that it was given by the system.
            with socket.create_server(("127.0.0.1", 0)) as sock:
                self.port = sock.getsockname()[1]
            command = [shutil.which("socat") or "socat", *SOCAT[name]]
            command += [f"TCP-LISTEN:{self.port},bind=127.0.0.1,reuseaddr,fork,backlog=128"]
            command += [f"TCP:127.0.0.1:{target}"]
        else:
            return
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})
        if name in OURS:
            assert self.process.stdout is not None
            # "relay on 127.0.0.1:7100 to ..."
            self.port = int(self.process.stdout.readline().split()[2].rpartition(":")[2])
        else:
            self._wait_until_it_listens()

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            time.sleep(0.01)
        raise RuntimeError(f"{self.name} does not listen")

    def _pids(self) -> list[int]:
        """The process and its children, one for each connection of socat's."""
        if self.process is None:
            return []
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def cpu_seconds(self) -> float:
        """CPU that these have used, to the nanosecond."""
        used = (Path(f"/proc/{pid}/schedstat").read_text().split()[0] for pid in self._pids())
        return sum(map(int, used)) / 1e9

    def stop(self) -> None:
        """End it and wait."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


class Load:
    """The sink, and for each round a source."""

    def __init__(self, core: int | None, path: str) -> None:
        self._core = core
        self._path = path
        self._counters: Counters = RawArray(c_ulonglong, MOST_CONNECTIONS)
        ours, theirs = processes.Pipe(duplex=False)
        self._sink = processes.Process(target=swallow, args=(theirs, self._counters, core))
        self._sink.start()
        self.port: int = ours.recv()

    def drive(self, relay: Relay, connections: int, seconds: float) -> Round:
        """Keep so many connections full for a while."""
        before = list(self._counters)
        source = processes.Process(
            target=pour, args=(relay.port, connections, self._core, self._path)
        )
        source.start()
        try:
            deadline = time.monotonic() + PATIENCE
            while (
                sum(now > was for now, was in zip(self._counters, before, strict=True))
                < connections
            ):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{relay.name}: nothing comes through")
                time.sleep(0.01)
            time.sleep(SETTLE)
            begun, received, used = time.perf_counter(), sum(self._counters), relay.cpu_seconds()
            time.sleep(seconds)
            used = relay.cpu_seconds() - used
            received = sum(self._counters) - received
            elapsed = time.perf_counter() - begun
        finally:
            source.kill()
            source.join()
        time.sleep(SETTLE)
        return Round(
            rate=received / elapsed / 1e6, cpu=used / received * 2**30, share=used / elapsed
        )

    def stop(self) -> None:
        """End it and wait."""
        self._sink.kill()
        self._sink.join()


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=1.5, help="a round of one relay")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    cores = sorted(os.sched_getaffinity(0))
    relay_core, load_core = (cores[0], cores[-1]) if len(cores) > 1 else (None, None)
    names = ["direct", *OURS]
    if shutil.which("socat"):
        names += SOCAT
    else:
        print("left out: socat, which is not installed (apt install socat)")
    rounds: dict[tuple[int, str], list[Round]] = {}
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile())
        file.truncate(FILE_SIZE)
        load = Load(load_core, file.name)
        stack.callback(load.stop)
        relays = []
        for name in names:
            relays.append(Relay(name, load.port, relay_core))
            stack.callback(relays[-1].stop)
        for _ in range(options.rounds):
            for connections in options.connections:
                for relay in relays:
                    rounds.setdefault((connections, relay.name), []).append(
                        load.drive(relay, connections, options.seconds)
                    )

    print(
        f"relayed one way, medians of {options.rounds} interleaved rounds; "
        f"Python {platform.python_version()}, trio {trio.__version__}, "
        f"{platform.system()} {platform.release()}, {len(cores)} cores"
    )
    titles = (("connections", 11), ("  relay", -24), ("MB/s", 10))
    titles += (("CPU s/GiB", 12), ("of a core", 11), ("CPU x socat", 13))
    print("".join(t.ljust(-width) if width < 0 else t.rjust(width) for t, width in titles))
    for (connections, name), results in rounds.items():
        rate = statistics.median(r.rate for r in results)
        cpu, share = (statistics.median(getattr(r, f) for r in results) for f in ("cpu", "share"))
        print(f"{connections:>11}  {name:22}{rate:>10,.0f}", end="")
        socat = rounds.get((connections, "socat"))
        if name == "direct":
            print()
        elif socat:
            ratio = cpu / statistics.median(r.cpu for r in socat)
            print(f"{cpu:>12.2f}{share:>11.0%}{ratio:>13.2f}")
        else:
            print(f"{cpu:>12.2f}{share:>11.0%}")


if __name__ == "__main__":
    main()
