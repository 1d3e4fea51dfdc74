"""FAULTS 44 and 45: a crowd that loses its server together, and a server that accepts and closes.

The sockets are the test's own: connecting takes no time, and the test says what it meets. So
whatever time passes on the virtual clock is the backoff's.
"""

from __future__ import annotations

import errno
import logging
import random
import socket
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate, chain, pairwise, takewhile
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.conftest import no_leaks
from trioreactor import (
    Backoff,
    CloseReason,
    ConnectAttempt,
    Connector,
    TcpClient,
    TcpConnection,
)
from trioreactor.backoff import Jitter

SERVER = ("192.0.2.1", 7)
OTHER = ("192.0.2.2", 7)

# The backoff's ceilings, one for each attempt after the loss.
CEILINGS = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]


class Network(trio.abc.SocketFactory):
    """Makes every socket of one trio run; of those that connect it keeps the peers."""

    def __init__(self) -> None:
        self.down = False
        self.open = 0
        # Gets the address that was connected to and the server's end. None: nobody sends or reads.
        self.serve: Callable[[Any, socket.socket], object] | None = None
        trio.socket.set_custom_socket_factory(self)

    def socket(
        self,
        family: socket.AddressFamily | int = socket.AF_INET,
        kind: socket.SocketKind | int = socket.SOCK_STREAM,
        proto: int = 0,
    ) -> trio.socket.SocketType:
        """A socket that is not connected yet."""
        return NetworkSocket(self)


class NetworkSocket(trio.socket.SocketType):
    """The client's end: what `Connector` and `TcpConnection` ask of a socket, and no more."""

    family = socket.AF_INET
    type = socket.SOCK_STREAM
    proto = 0

    def __init__(self, network: Network) -> None:
        self._network = network
        self._peer: Any = None
        self._half: socket.socket | None = None
        self._closed = False
        network.open += 1

    async def connect(self, address: Any) -> None:
        await trio.lowlevel.checkpoint()
        if self._network.down:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        self._peer = address
        if self._network.serve is not None:
            self._half, far = socket.socketpair()
            self._half.setblocking(False)
            self._network.serve(address, far)

    def fileno(self) -> int:
        return self._half.fileno() if self._half is not None else -1

    def getsockname(self) -> Any:
        return ("192.0.2.99", 12345)

    def getpeername(self) -> Any:
        return self._peer

    def getsockopt(self, level: int, optname: int, buflen: int | None = None) -> Any:
        return 0

    def setsockopt(self, level: int, optname: int, value: Any, optlen: int | None = None) -> None:
        pass

    def shutdown(self, flag: int) -> None:
        if self._half is not None:
            self._half.shutdown(flag)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._network.open -= 1
            if self._half is not None:
                self._half.close()


# -- the storm

CLIENTS = 2000
# Numbers of which the binary clock loses nothing: how long each client was connected, and how long
# the server is down.
LIVED = 16.0
OUTAGE = 32.0


def seeded(seed: int, client: int, jitter: Jitter | float = "full") -> Backoff:
    """The default backoff, with one client's own chance."""
    return Backoff(jitter=jitter, random=random.Random(f"{seed} {client}").random)


def computed(seed: int, *, until: float, jitter: Jitter | float = "full") -> list[list[float]]:
    """When each client attempts, in seconds since the loss, if it does as its backoff says."""
    return [
        list(takewhile(lambda time: time < until, accumulate(seeded(seed, client, jitter))))
        for client in range(CLIENTS)
    ]


async def storm(backoffs: list[Backoff]) -> list[list[float]]:
    """The same of real connectors, up to the attempt that finds the server again."""
    network = Network()
    attempts: list[list[float]] = [[] for _ in backoffs]

    async def client(backoff: Backoff, times: list[float]) -> None:
        def note(attempt: ConnectAttempt) -> None:
            if network.down or times:
                times.append(trio.current_time() - LIVED)

        connector = Connector(*SERVER, backoff=backoff, on_attempt=note)
        async with await connector.connect():
            await trio.sleep(LIVED)
        async with await connector.connect():
            assert connector.attempts == 1 + len(times)

    async with trio.open_nursery() as nursery:
        for backoff, times in zip(backoffs, attempts, strict=True):
            nursery.start_soon(client, backoff, times)
        await trio.sleep(LIVED / 2)
        assert network.open == len(backoffs)
        network.down = True
        await trio.sleep(LIVED / 2 + OUTAGE)
        network.down = False
    assert network.open == 0
    return attempts


def after_the_second(attempts: list[list[float]]) -> list[float]:
    """The times of all attempts but each client's first two, in order."""
    return sorted(chain.from_iterable(times[2:] for times in attempts))


def within(times: list[float], begin: float, end: float) -> int:
    """How many of *times*, which are in order, are from *begin* to before *end*."""
    return bisect_left(times, end) - bisect_left(times, begin)


def peak(times: list[float]) -> int:
    """The most in any one second: one of the fullest seconds begins with an attempt."""
    return max(within(times, time, time + 1) for time in times)


def peak_to_mean_around(times: list[float], *, begin: float, end: float) -> float:
    """The fullest second against the mean rate of its time.

    The rate falls while the delays grow, as one over the time since the loss, so the mean of the
    whole outage says nothing about its beginning. The mean of a second at time t is taken from t/2
    to 2t.
    """
    return max(
        within(times, time, time + 1) * 1.5 * time / within(times, time / 2, 2 * time)
        for time in times
        if begin <= time < end
    )


@pytest.mark.pure
async def test_connectors_in_the_storm(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """2,000 connectors that lose one server together attempt when their backoff says, to the
    moment; from the second attempt on no second has twice its time's mean; all come back.
    """
    # Or a line for each failure would be kept.
    caplog.set_level(logging.ERROR, "trioreactor.connector")
    attempts = await storm([seeded(0, client) for client in range(CLIENTS)])
    for times, plan in zip(attempts, computed(0, until=OUTAGE + 30), strict=True):
        assert times == pytest.approx(plan[: len(times)], abs=1e-6)
        # The one after the outage, and only that, has found the server.
        assert times[-1] >= OUTAGE > times[-2]
    times = after_the_second(attempts)
    assert peak_to_mean_around(times, begin=1.5, end=OUTAGE / 2) <= 2
    # Nor does the crowd fall upon the server that is back: in step, they would come as one.
    assert peak([time for time in times if time >= OUTAGE]) < CLIENTS / 10


@pytest.mark.pure
async def test_connectors_in_the_storm_without_jitter(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The contrast: with no jitter all clients attempt at one moment, each time."""
    caplog.set_level(logging.ERROR, "trioreactor.connector")
    # Were there 2,000 of them, nothing would be different.
    attempts = await storm([seeded(0, client, "none") for client in range(200)])
    assert all(times == list(accumulate(CEILINGS[:7])) for times in attempts)


@pytest.mark.pure
@pytest.mark.parametrize("seed", range(4))
def test_the_crowd_is_spread(seed: int) -> None:
    """After the second attempt the fullest second has at most twice its time's mean, through
    every stage of a long outage.
    """
    attempts = computed(seed, until=480)
    times = after_the_second(attempts)
    second_attempts_over = max(times[1] for times in attempts)
    assert peak_to_mean_around(times, begin=second_attempts_over, end=240) <= 2
    # When every delay has its greatest ceiling there is no trend, and the mean is plainly that.
    steady = [time for time in times if 240 <= time < 480]
    assert peak(steady) <= 2 * len(steady) / 240


@pytest.mark.pure
@pytest.mark.parametrize("seed", range(4))
def test_each_round_is_spread(seed: int) -> None:
    """The k-th attempts of all clients are spread over at least the ceiling of the k-th delay: no
    second has more than twice what that would give.
    """
    attempts = computed(seed, until=480)
    for number, ceiling in enumerate(CEILINGS):
        if number < 2:
            continue
        times = sorted(each[number] for each in attempts)
        assert peak(times) <= 2 * CLIENTS / ceiling
        # They lie as a hill whose slopes are the delays before: twice the mean over its whole width
        # is what its top comes to, so only the first of them are surely below.
        if number < 5:
            assert peak(times) <= 2 * CLIENTS / (times[-1] - times[0])


@pytest.mark.pure
def test_the_rate_falls() -> None:
    """While the delays grow, the crowd's rate halves whenever the outage has lasted twice as long;
    in the end it is one attempt a client in half the maximum, the mean of full jitter.
    """
    times = after_the_second(computed(0, until=480))
    rates = [within(times, begin, 2 * begin) / begin for begin in (2, 4, 8)]
    for before, after in pairwise(rates):
        assert 0.4 < after / before < 0.6
    assert within(times, 240, 480) / 240 == pytest.approx(CLIENTS / 15, rel=0.02)


@pytest.mark.pure
def test_the_crowd_without_jitter() -> None:
    """The contrast, by the same measures: every second that is not empty has all of them."""
    attempts = computed(0, until=480, jitter="none")
    times = after_the_second(attempts)
    assert peak_to_mean_around(times, begin=1.5, end=240) > 20
    steady = [time for time in times if 240 <= time < 480]
    assert peak(steady) == CLIENTS == 30 * len(steady) / 240


# -- the server that flaps

NO_JITTER = Backoff(jitter="none")


class Flapping:
    """A network whose servers close each connection after the time that the test says, and a
    client of theirs that stays connected.
    """

    def __init__(self, *lives: float | None, rest: float = 0, **options: Any) -> None:
        """*lives* of the connections in turn, seconds, None for one that is refused; *rest* that of
        all others.
        """
        self.network = Network()
        self.network.serve = self._serve
        self._lives = list(lives)
        self._rest = rest
        # When something was attempted, and where.
        self.times: list[float] = []
        self.places: list[Any] = []
        self.client = TcpClient(
            handler=self._handler,
            **({"endpoints": [SERVER], "backoff": NO_JITTER} | options),
            on_attempt=self._attempted,
        )

    def _attempted(self, attempt: ConnectAttempt) -> None:
        self.times.append(trio.current_time())
        self.places.append(attempt.endpoint)

    def _serve(self, address: Any, far: socket.socket) -> None:
        life = self._lives.pop(0) if self._lives else self._rest
        if life is None:
            far.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        if life:
            self._nursery.start_soon(self._close_after, life, far)
        else:
            far.close()

    async def _close_after(self, seconds: float, far: socket.socket) -> None:
        with far:
            await trio.sleep(seconds)

    async def _handler(self, conn: TcpConnection) -> None:
        async for _ in conn:
            raise AssertionError("nobody sends")

    async def run(self, seconds: float) -> None:
        """Run the client for that long."""
        async with no_leaks(), trio.open_nursery() as self._nursery:
            with trio.move_on_after(seconds):
                await self.client.run()
            # Servers that still hold a connection.
            self._nursery.cancel_scope.cancel()
        assert self.network.open == 0

    @property
    def delays(self) -> list[float]:
        """The time between each attempt and the next."""
        return [after - before for before, after in pairwise(self.times)]


async def test_a_flapping_server(autojump_clock: MockClock) -> None:
    """A server that accepts and closes at once is attempted ever more slowly, exactly as the
    backoff says: connecting alone makes nothing begin anew, and nothing spins.
    """
    flapping = Flapping()
    await flapping.run(3600)
    growing = [0.5, 1, 2, 4, 8, 16]
    assert flapping.delays[:6] == growing
    assert set(flapping.delays[6:]) == {30}
    assert len(flapping.times) == 1 + len(growing) + int(3600 - sum(growing)) // 30
    statistics = flapping.client.statistics()
    assert statistics.attempts == statistics.opened == len(flapping.times)
    assert dict(statistics.closed) == {CloseReason.PEER_EOF: len(flapping.times)}


async def test_a_flapping_server_with_jitter(autojump_clock: MockClock) -> None:
    """With jitter each delay is what the backoff's chance makes of it."""
    flapping = Flapping(backoff=seeded(7, 7))
    await flapping.run(600)
    plan = computed_delays(seeded(7, 7), len(flapping.delays))
    assert len(plan) > 20
    assert flapping.delays == pytest.approx(plan)


def computed_delays(backoff: Backoff, number: int) -> list[float]:
    """The first *number* delays."""
    return [delay for delay, _ in zip(backoff, range(number), strict=False)]


async def test_a_connection_that_lived(autojump_clock: MockClock) -> None:
    """One that lived `reset_after` seconds makes the delays begin anew; one that lived a moment
    less does not.
    """
    flapping = Flapping(0, 0, 10, 0, 10 - 2**-10, 0, 11)
    await flapping.run(60)
    gaps = [0.5, 1, 10 + 0.5, 1, 10 - 2**-10 + 2, 4, 11 + 0.5, 1, 2, 4, 8]
    assert flapping.delays == gaps[: len(flapping.delays)]
    assert len(flapping.delays) >= 10


@pytest.mark.parametrize(("reset_after", "anew"), [(0, True), (2, True), (3, True), (3.5, False)])
async def test_reset_after(reset_after: float, anew: bool, autojump_clock: MockClock) -> None:
    """How long it must live is the user's to say; after 0 every connection makes them anew."""
    flapping = Flapping(rest=3, backoff=Backoff(jitter="none", reset_after=reset_after))
    await flapping.run(30)
    assert flapping.delays[:4] == ([3.5] * 4 if anew else [3.5, 4, 5, 7])


async def test_a_server_that_flaps_and_refuses(autojump_clock: MockClock) -> None:
    """Refused attempts and connections that end at once are one series of delays."""
    flapping = Flapping(0, None, None, 0)
    await flapping.run(20)
    assert flapping.delays == [0.5, 1, 2, 4, 8]
    statistics = flapping.client.statistics()
    assert dict(statistics.failures) == {"ECONNREFUSED": 2}
    assert statistics.opened == 4


@pytest.mark.parametrize("first", [0, None], ids=["flaps", "refuses"])
async def test_the_other_server_is_good(first: float | None, autojump_clock: MockClock) -> None:
    """Where the first of two endpoints flaps, or refuses, the client gets to the second at once,
    and stays.
    """
    flapping = Flapping(first, rest=1000, endpoints=[SERVER, OTHER])
    await flapping.run(500)
    assert flapping.places == [SERVER, OTHER]
    assert flapping.delays == [0]
    assert flapping.client.statistics().opened == (2 if first is not None else 1)


async def test_both_servers_flap(autojump_clock: MockClock) -> None:
    """Where both flap there is one delay for each round of them."""
    flapping = Flapping(endpoints=[SERVER, OTHER])
    await flapping.run(20)
    assert flapping.places == [SERVER, OTHER] * 6
    assert flapping.delays == [0, 0.5, 0, 1, 0, 2, 0, 4, 0, 8, 0]


async def test_back_to_the_first(autojump_clock: MockClock) -> None:
    """After a connection that lived, a new round begins: the preferred endpoint comes first, also
    where the one that was lost was not the last of its round.
    """
    flapping = Flapping(0, 10, 10, 1000, endpoints=[SERVER, OTHER])
    await flapping.run(500)
    assert flapping.places == [SERVER, OTHER, SERVER, SERVER]
    assert flapping.delays == [0, 10.5, 10.5]
