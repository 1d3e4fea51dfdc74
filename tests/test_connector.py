"""The connector: attempts, backoff, failover, states, and every way that a connect ends."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import random
import socket
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.conftest import cancelled_after, living_tasks, no_leaks
from tests.fake_network import CONNECTED, HANGS, Answer, FakeNetwork, failing
from trioreactor import (
    Backoff,
    CloseReason,
    ConnectAttempt,
    ConnectError,
    Connector,
    ConnectorState,
    ConnectorStatistics,
    Endpoint,
    Keepalive,
    SendBufferFull,
    SocketOptions,
    TcpConnection,
    Timeouts,
    TrioReactorError,
    Watermarks,
    open_tcp_connection,
)
from trioreactor.connect_options import ConnectOptions, RetryOptions
from trioreactor.connecting import connection_on
from trioreactor.connector import REMEMBERED

A: Endpoint = ("192.0.2.1", 1)
B: Endpoint = ("192.0.2.2", 2)
C: Endpoint = ("192.0.2.3", 3)
REFUSED = failing(errno.ECONNREFUSED)


def network_with(*answers: Answer) -> FakeNetwork:
    """A network where A answers so, one after the other; the last answer stays."""
    network = FakeNetwork()
    network.answers[A] = list(answers)
    return network


class Log(list[ConnectAttempt]):
    """An `on_attempt` that remembers."""

    def __call__(self, attempt: ConnectAttempt) -> None:
        self.append(attempt)

    def delays(self) -> list[float | None]:
        return [attempt.delay for attempt in self]

    def endpoints(self) -> list[Endpoint]:
        return [attempt.endpoint for attempt in self]


async def failure_of(connector: Connector) -> ConnectError:
    """The error that `connect` ends by."""
    with pytest.raises(ConnectError) as caught:
        await connector.connect()
    return caught.value


class AtStep(trio.abc.Instrument):
    """Calls *act* after so many steps of tasks, whichever they are.

    Unlike a task that counts, it leaves the loop idle, so that a mock clock goes on.
    """

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self.left = number
        self.act = act

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """A task has come to a checkpoint, or parked, or ended."""
        self.left -= 1
        if not self.left:
            self.act()


@contextmanager
def at_step(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Call *act* after so many steps of tasks (0: at once)."""
    instrument = AtStep(number, act)
    trio.lowlevel.add_instrument(instrument)
    if not number:
        act()
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)


# -- attempts


async def test_connected_at_once() -> None:
    """One attempt, and the stream is given: of the endpoint, open, the only socket."""
    network = network_with(CONNECTED)
    stream = await Connector(*A).connect()
    assert stream.socket.getpeername() == A
    assert network.open == [stream.socket]


async def test_every_attempt_is_told(autojump_clock: trio.testing.MockClock) -> None:
    """`on_attempt` gets each with its number, endpoint, address, duration, error and the delay that
    follows, and that delay follows."""
    network = network_with(
        failing(errno.ECONNREFUSED, after=0.25), failing(errno.EHOSTUNREACH), Answer(after=0.5)
    )
    log = Log()
    told_at: list[float] = []

    def on_attempt(attempt: ConnectAttempt) -> None:
        log(attempt)
        told_at.append(trio.current_time())

    await Connector(*A, backoff=[2, 4, 8], on_attempt=on_attempt).connect()
    refused, unreachable = log[0].error, log[1].error
    assert isinstance(refused, ConnectionRefusedError)
    assert isinstance(unreachable, OSError)
    assert unreachable.errno == errno.EHOSTUNREACH
    place: Any = {"endpoint": A}
    assert log == [
        ConnectAttempt(**place, number=1, address=None, duration=0.25, error=refused, delay=2),
        ConnectAttempt(**place, number=2, address=None, duration=0, error=unreachable, delay=4),
        ConnectAttempt(**place, number=3, address=A, duration=0.5, error=None, delay=None),
    ]
    assert told_at == [0.25, 2.25, 6.75]
    assert [time for time, _ in network.tried] == [0, 2.25, 6.25]


async def test_numbers_begin_anew(autojump_clock: trio.testing.MockClock) -> None:
    """Attempts are numbered within a connect, and counted over the connector's life."""
    network_with(REFUSED, CONNECTED, REFUSED, CONNECTED)
    log = Log()
    connector = Connector(*A, on_attempt=log)
    for _ in range(2):
        await connector.connect()
    assert [attempt.number for attempt in log] == [1, 2, 1, 2]
    assert (connector.attempts, connector.failed) == (4, 2)


async def test_statistics(autojump_clock: trio.testing.MockClock) -> None:
    """Attempts, connections, and failures by name: the errno's, or the kind of error."""
    network = network_with(
        REFUSED,
        failing(errno.EHOSTUNREACH),
        REFUSED,
        HANGS,
        Answer(error=OSError("no errno")),
        CONNECTED,
        failing(errno.EACCES),
    )
    connector = Connector(*A, connect_timeout=1)
    assert connector.statistics() == ConnectorStatistics(attempts=0, connected=0, failures={})
    await connector.connect()
    before = connector.statistics()
    await failure_of(connector)
    network.names["host"] = socket.gaierror(socket.EAI_AGAIN, "try again")
    by_name = Connector("host", 1, max_attempts=1)
    await failure_of(by_name)
    failures = {"ECONNREFUSED": 2, "EHOSTUNREACH": 1, "ETIMEDOUT": 1, "OSError": 1}
    assert before == ConnectorStatistics(attempts=6, connected=1, failures=failures)
    after = connector.statistics()
    assert after == ConnectorStatistics(attempts=7, connected=1, failures={**failures, "EACCES": 1})
    assert (connector.attempts, connector.failed) == (7, 6)
    assert by_name.statistics().failures == {"gaierror": 1}
    with pytest.raises(TypeError):
        after.failures["EACCES"] = 0  # type: ignore[index]


async def test_a_group_counts_as_its_first() -> None:
    """A host whose addresses fail each in its own way is one failed attempt."""
    network = FakeNetwork()
    network.names["host"] = ["192.0.2.1", "192.0.2.2"]
    network.answers["192.0.2.1", 1] = [failing(errno.ENETUNREACH)]
    connector = Connector("host", 1, max_attempts=1)
    error = await failure_of(connector)
    assert connector.statistics().failures == {"ENETUNREACH": 1}
    assert isinstance(error.__cause__, ExceptionGroup)
    assert "192.0.2.1:1" in str(error)
    assert "192.0.2.2:2" not in str(error)
    assert error.errno is None


async def test_attempts_are_logged(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure that is retried is a warning, and so is a second connection in a row that was lost
    soon; a success, or one that lived, is informative; what is raised is told by who catches it."""
    network_with(REFUSED, CONNECTED, CONNECTED, CONNECTED, CONNECTED, failing(errno.EACCES))
    caplog.set_level(logging.DEBUG, "trioreactor.connector")
    connector = Connector(*A, backoff=[2, 4, 8], name="mine")
    await connector.connect()
    for lived in (1, 1.5, 10):
        await trio.sleep(lived)
        await connector.connect()
    await trio.sleep(3)
    await failure_of(connector)
    told = [(r.levelname, r.getMessage()) for r in caplog.records if "->" not in r.getMessage()]
    assert told == [
        ("WARNING", "mine: 192.0.2.1:1: Connection refused; next attempt in 2.0 s"),
        ("INFO", "mine: 192.0.2.1:1: connected in 0.000 s"),
        ("INFO", "mine: the connection made 1.0 s ago is over; next attempt in 4.0 s"),
        ("INFO", "mine: 192.0.2.1:1: connected in 0.000 s"),
        ("WARNING", "mine: the connection made 1.5 s ago is over; next attempt in 8.0 s"),
        ("INFO", "mine: 192.0.2.1:1: connected in 0.000 s"),
        ("INFO", "mine: the connection made 10.0 s ago is over; next attempt in 2.0 s"),
        ("INFO", "mine: 192.0.2.1:1: connected in 0.000 s"),
        ("INFO", "mine: the connection made 3.0 s ago is over; next attempt in 4.0 s"),
        ("DEBUG", "mine: 192.0.2.1:1: Permission denied; no further attempt"),
    ]


# -- what on_attempt raises


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_on_attempt_raises(number: int, autojump_clock: trio.testing.MockClock) -> None:
    """It leaves connect as it is, at a failure and at a success, and leaves no socket open; the
    connector can connect again."""
    network = network_with(REFUSED, REFUSED, CONNECTED)

    def on_attempt(attempt: ConnectAttempt) -> None:
        if attempt.number == number and not raised:
            raised.append(True)
            raise ZeroDivisionError("a bug")

    raised: list[bool] = []
    connector = Connector(*A, on_attempt=on_attempt)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await connector.connect()
    assert network.open == []
    assert connector.state is ConnectorState.IDLE
    stream = await connector.connect()
    assert network.open == [stream.socket]


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        (REFUSED, {}),
        (REFUSED, {"backoff": [0, 0]}),
        (REFUSED, {"max_attempts": 1}),
        (REFUSED, {"retry": False}),
        (failing(errno.EACCES), {}),
        (CONNECTED, {}),
    ],
    ids=["delay", "no delay", "the last one", "no retry", "final", "connected"],
)
async def test_stop_by_on_attempt(
    answer: Answer, options: dict[str, Any], autojump_clock: trio.testing.MockClock
) -> None:
    """`on_attempt` may call `stop`, at every kind of attempt: connect says so, nothing leaks."""
    network = network_with(answer)
    connector = Connector(*A, on_attempt=lambda attempt: connector.stop(), **options)
    with pytest.raises(trio.ClosedResourceError):
        await connector.connect()
    assert network.open == []
    assert connector.attempts == len(network.tried) == 1
    assert connector.state is ConnectorState.STOPPED


async def test_on_attempt_may_turn_retry_off(autojump_clock: trio.testing.MockClock) -> None:
    """Then no attempt follows, and nobody waits for one."""
    network = network_with(REFUSED)

    def on_attempt(attempt: ConnectAttempt) -> None:
        connector.retry = attempt.number < 2

    connector = Connector(*A, backoff=[1, 1, 1], on_attempt=on_attempt)
    await failure_of(connector)
    assert [time for time, _ in network.tried] == [0, 1]
    assert trio.current_time() == 1


# -- how many attempts


@pytest.mark.parametrize("most", [1, 2, 5])
async def test_max_attempts(most: int, autojump_clock: trio.testing.MockClock) -> None:
    """It bounds the attempts of each connect exactly; after the last nobody waits."""
    network = network_with(REFUSED)
    log = Log()
    connector = Connector(*A, max_attempts=most, backoff=[1] * 10, on_attempt=log)
    for times in (1, 2):
        error = await failure_of(connector)
        assert len(network.tried) == times * most
        assert len(error.attempts) == most
        assert log.delays()[-1] is None
    assert trio.current_time() == 2 * (most - 1)


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        ([], [None]),
        ((1.0, 2), [1, 2, None]),
        (iter([3]), [3, None]),
        ([0.0], [0, None]),
        (Backoff(initial=1, maximum=4, jitter="none"), [1, 2, 4, 4, None]),
    ],
)
async def test_delays_come_from_the_backoff(
    backoff: Backoff | Iterable[float],
    delays: list[float | None],
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A Backoff, or any iterable of seconds: when that ends, so do the attempts."""
    network_with(REFUSED)
    log = Log()
    await failure_of(Connector(*A, backoff=backoff, max_attempts=5, on_attempt=log))
    assert log.delays() == delays
    assert trio.current_time() == sum(delay or 0 for delay in delays)


@pytest.mark.parametrize("delay", [-1, float("inf"), float("nan")])
async def test_a_delay_that_is_none(delay: float) -> None:
    """An iterable that gives what is no time to wait is told so, and nothing is left open."""
    network = network_with(REFUSED)
    connector = Connector(*A, backoff=[delay])
    with pytest.raises(ValueError, match="0 seconds or more"):
        await connector.connect()
    assert network.open == []
    assert connector.state is ConnectorState.IDLE


async def test_each_connect_begins_anew(autojump_clock: trio.testing.MockClock) -> None:
    """After a connect that failed, the next has all the delays, no pause, and the given-up
    endpoints again."""
    network = network_with(failing(errno.EACCES), REFUSED)
    network.answers[B] = [REFUSED]
    log = Log()
    connector = Connector(endpoints=[A, B], backoff=[1, 2], on_attempt=log)
    await failure_of(connector)
    assert log.endpoints() == [A, B, B, B]
    begun = trio.current_time()
    await failure_of(connector)
    assert log.endpoints()[4:] == [A, B, A, B, A, B]
    assert log.delays()[4:] == [0, 1, 0, 2, 0, None]
    assert trio.current_time() - begun == 3
    assert network.open == []


# -- retry


async def test_no_retry_tries_each_endpoint_once(autojump_clock: trio.testing.MockClock) -> None:
    """`retry=False`: one round, with no delay in it, and none after."""
    network = network_with(REFUSED)
    log = Log()
    connector = Connector(endpoints=[A, B, C], retry=False, on_attempt=log)
    error = await failure_of(connector)
    assert [place for _, place in network.tried] == [A, B, C]
    assert log.delays() == [0, 0, None]
    assert list(error.attempts) == log
    assert trio.current_time() == 0


async def test_no_retry_goes_on_to_the_next_endpoint() -> None:
    """`retry=False` still finds the endpoint that works."""
    network = FakeNetwork()
    network.answers[B] = [CONNECTED]
    stream = await Connector(endpoints=[A, B, C], retry=False).connect()
    assert stream.socket.getpeername() == B


async def test_retry_turned_off_while_it_waits(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever waits for the next attempt raises at once, of what failed so far."""
    network = network_with(REFUSED)
    connector = Connector(*A, backoff=[100])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 30, lambda: setattr(connector, "retry", False))
        error = await failure_of(connector)
    assert trio.current_time() == 30
    assert len(error.attempts) == len(network.tried) == 1
    assert not connector.retry


async def test_retry_turned_off_in_an_attempt(autojump_clock: trio.testing.MockClock) -> None:
    """The attempt that runs goes on, and the rest of its round; no other round follows."""
    network = network_with(failing(errno.ECONNREFUSED, after=3))
    connector = Connector(endpoints=[A, B])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 1, lambda: setattr(connector, "retry", False))
        await failure_of(connector)
    assert network.tried == [(0, A), (3, B)]
    assert trio.current_time() == 3


async def test_retry_turned_off_between_connections(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It ends the pause after a connection, too; and turned off before, there is no pause."""
    network = network_with(CONNECTED)
    connector = Connector(*A, backoff=[100] * 3)
    await connector.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 5, lambda: setattr(connector, "retry", False))
        error = await failure_of(connector)
    assert trio.current_time() == 5
    assert error.attempts == ()
    assert "retry" in str(error)
    assert connector.state is ConnectorState.IDLE
    await connector.connect()
    assert trio.current_time() == 5
    assert len(network.tried) == 2


async def test_retry_turned_on_again(autojump_clock: trio.testing.MockClock) -> None:
    """Then delays are waited again."""
    network = network_with(REFUSED, REFUSED, CONNECTED)
    connector = Connector(*A, backoff=[4, 4], retry=False)
    await failure_of(connector)
    connector.retry = True
    assert connector.retry
    await connector.connect()
    assert [time for time, _ in network.tried] == [0, 0, 4]


async def at(seconds: float, fn: Callable[[], object]) -> None:
    """Call it, at that time."""
    await trio.sleep(seconds)
    fn()


# -- which errors end it

# Written out again here: what is retried is the contract, not whatever the library's set is.
FINAL = {
    errno.EACCES,
    errno.EPERM,
    errno.EAFNOSUPPORT,
    errno.EPROTONOSUPPORT,
    errno.EPROTOTYPE,
    errno.EINVAL,
    errno.ENOTSOCK,
    errno.ENAMETOOLONG,
}
CAN_PASS = [
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ETIMEDOUT,
    errno.EADDRINUSE,
    errno.EADDRNOTAVAIL,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ENOENT,
    errno.EAGAIN,
    errno.ENOTCONN,
]


@pytest.mark.parametrize("where", ["socket", "bind", "connect"])
async def test_the_errno_matrix(where: str) -> None:
    """Every errno of the platform, from every call: what can pass is retried, and what cannot ends
    it at once. The error has the errno in either case."""
    assert not FINAL & set(CAN_PASS)
    for number in errno.errorcode:
        error = OSError(number, os.strerror(number))
        network = network_with(CONNECTED)
        match where:
            case "socket":
                network.socket_error = error
            case "bind":
                network.bind_error = error
            case _:
                network.answers[A] = [Answer(error=error)]
        log = Log()
        connector = Connector(
            *A, backoff=[0] * 9, max_attempts=3, local_address="192.0.2.9", on_attempt=log
        )
        raised = await failure_of(connector)
        name = errno.errorcode[number]
        assert len(log) == (1 if number in FINAL else 3), name
        assert raised.errno == number, name
        assert connector.statistics().failures == {name: len(log)}
        assert network.open == []


RESOLVER_MATRIX = [
    ("EAI_AGAIN", True),
    ("EAI_FAIL", True),
    ("EAI_MEMORY", True),
    ("EAI_NODATA", True),
    ("EAI_NONAME", True),
    ("EAI_SYSTEM", True),
    ("EAI_BADFLAGS", False),
    ("EAI_FAMILY", False),
    ("EAI_SERVICE", False),
    ("EAI_SOCKTYPE", False),
]


@pytest.mark.parametrize(("name", "passes"), RESOLVER_MATRIX)
async def test_the_resolvers_errors(name: str, passes: bool) -> None:
    """A name that is unknown may be known later; a question that is wrong stays wrong."""
    if not hasattr(socket, name):
        pytest.skip(f"this platform has no {name}")
    network = FakeNetwork()
    network.names["host"] = socket.gaierror(getattr(socket, name), "no")
    connector = Connector("host", 1, backoff=[0] * 9, max_attempts=3)
    error = await failure_of(connector)
    assert len(error.attempts) == (3 if passes else 1)
    assert isinstance(error.__cause__, socket.gaierror)


async def test_a_host_that_has_no_spelling() -> None:
    """A name that DNS cannot spell is given up, with an error that says the name."""
    connector = Connector("a" * 64 + ".example", 1)
    error = await failure_of(connector)
    assert len(error.attempts) == 1
    assert isinstance(error.__cause__, UnicodeError)
    assert "a" * 64 in str(error)


async def test_addresses_that_fail_in_their_own_ways(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """One address's error that can pass keeps the host; only final ones give it up."""
    network = FakeNetwork()
    network.names["host"] = ["192.0.2.1", "192.0.2.2"]
    network.answers["192.0.2.1", 1] = [failing(errno.EACCES)]
    network.answers["192.0.2.2", 1] = [REFUSED, REFUSED, failing(errno.EINVAL)]
    error = await failure_of(Connector("host", 1))
    assert len(error.attempts) == 3
    last = error.__cause__
    assert isinstance(last, ExceptionGroup)
    assert [one.errno for one in last.exceptions] == [errno.EACCES, errno.EINVAL]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL])
async def test_a_final_error_gives_the_endpoint_up(
    number: int, autojump_clock: trio.testing.MockClock
) -> None:
    """The others go on; when the last one is given up, it ends at once."""
    network = network_with(failing(number))
    network.answers[B] = [REFUSED, REFUSED, failing(number)]
    network.answers[C] = [REFUSED, failing(number)]
    log = Log()
    error = await failure_of(Connector(endpoints=[A, B, C], backoff=[1] * 9, on_attempt=log))
    assert log.endpoints() == [A, B, C, B, C, B]
    assert log.delays() == [0, 0, 1, 0, 1, None]
    assert list(error.attempts) == log
    assert trio.current_time() == 2


async def test_what_is_no_network_error(autojump_clock: trio.testing.MockClock) -> None:
    """A bug is neither retried nor wrapped in a ConnectError."""
    network = network_with(Answer(error=ZeroDivisionError("a bug")))
    connector = Connector(*A)
    with pytest.raises(ExceptionGroup) as caught:
        await connector.connect()
    assert caught.group_contains(ZeroDivisionError)
    assert len(network.tried) == 1
    assert network.open == []
    assert connector.state is ConnectorState.IDLE


# -- the timeout


@pytest.mark.parametrize("what", ["connect", "resolver", "unix"])
async def test_connect_timeout(what: str, autojump_clock: trio.testing.MockClock) -> None:
    """It bounds each attempt, the resolver included, and is an error that can pass."""
    network = network_with(HANGS)
    network.names["host"] = None
    network.answers["/socket"] = [HANGS]
    options: dict[str, Any] = {
        "connect": {"host": A[0], "port": A[1]},
        "resolver": {"host": "host", "port": 1},
        "unix": {"path": "/socket"},
    }[what]
    log = Log()
    connector = Connector(
        connect_timeout=1.5, max_attempts=2, backoff=[2], on_attempt=log, **options
    )
    error = await failure_of(connector)
    assert trio.current_time() == 5
    assert [attempt.duration for attempt in log] == [1.5, 1.5]
    assert error.errno == errno.ETIMEDOUT
    assert isinstance(error.__cause__, TimeoutError)
    assert "within 1.5 s" in str(error)
    assert network.open == []


async def test_the_default_connect_timeout(autojump_clock: trio.testing.MockClock) -> None:
    """Ten seconds; None is no bound."""
    network = network_with(HANGS)
    await failure_of(Connector(*A, retry=False))
    assert trio.current_time() == 10
    with trio.move_on_after(10_000) as scope:
        await Connector(*A, connect_timeout=None).connect()
    assert scope.cancelled_caught
    assert len(network.tried) == 2
    assert network.open == []


async def test_connected_at_the_timeout(autojump_clock: trio.testing.MockClock) -> None:
    """The connection made in the very turn of the timeout is given or closed, never lost."""
    network = network_with(Answer(after=2))
    connector = Connector(*A, connect_timeout=2, retry=False)
    try:
        stream = await connector.connect()
    except ConnectError:
        assert network.open == []
    else:
        assert network.open == [stream.socket]


# -- ConnectError


async def test_connect_error() -> None:
    """It is ours, and an OSError, with the last error as its cause, its errno, and the attempts."""
    network_with(REFUSED, REFUSED, failing(errno.EHOSTUNREACH))
    log = Log()
    error = await failure_of(Connector(*A, backoff=[0, 0], on_attempt=log))
    assert isinstance(error, OSError)
    assert isinstance(error, TrioReactorError)
    assert error.attempts == tuple(log)
    assert error.__cause__ is log[-1].error
    assert error.errno == errno.EHOSTUNREACH
    assert str(error) == "no connection after 3 attempts: 192.0.2.1:1: No route to host"


async def test_endless_attempts_are_forgotten() -> None:
    """Where their number has no bound, only the last ones are remembered; with `max_attempts`, all
    are."""
    network_with(REFUSED)
    error = await failure_of(Connector(*A, backoff=[0] * 40))
    assert [attempt.number for attempt in error.attempts] == list(range(42 - REMEMBERED, 42))
    error = await failure_of(Connector(*A, backoff=[0] * 40, max_attempts=30))
    assert len(error.attempts) == 30


async def test_errors_hold_no_frames() -> None:
    """What is remembered of an attempt keeps nothing else alive: no tracebacks, however nested."""
    network = FakeNetwork()
    network.names["host"] = ["192.0.2.1", "192.0.2.2"]
    log = Log()
    for connector in (
        Connector("host", 1, retry=False, on_attempt=log),
        Connector(*A, retry=False, on_attempt=log),
        Connector(*A, retry=False, connect_timeout=0.001, on_attempt=log),
        Connector("a" * 64, 1, retry=False, on_attempt=log),
    ):
        network.answers[A] = [REFUSED] if len(log) < 2 else [HANGS]
        await failure_of(connector)
    left: list[BaseException | None] = [attempt.error for attempt in log]
    assert len(left) == 4
    while left:
        if (error := left.pop()) is None:
            continue
        assert error.__traceback__ is None
        left += [error.__context__, error.__cause__]
        if isinstance(error, BaseExceptionGroup):
            left += error.exceptions


# -- failover


async def test_failover_order(autojump_clock: trio.testing.MockClock) -> None:
    """Each endpoint once a round, in order with no delay between; the backoff's after a round."""
    network = FakeNetwork()
    network.answers[B] = [REFUSED, REFUSED, CONNECTED]
    log = Log()
    await Connector(endpoints=[A, B, C], backoff=[1, 2, 3], on_attempt=log).connect()
    assert log.endpoints() == [A, B, C, A, B, C, A, B]
    assert log.delays() == [0, 0, 1, 0, 0, 2, 0, None]
    assert [time for time, _ in network.tried] == [0, 0, 0, 1, 1, 1, 3, 3]


async def test_endpoints_of_both_kinds() -> None:
    """Hosts and Unix paths may stand side by side."""
    network = FakeNetwork()
    network.answers["/socket"] = [CONNECTED]
    log = Log()
    stream = await Connector(endpoints=[A, "/socket"], on_attempt=log).connect()
    assert stream.socket.family is socket.AF_UNIX
    assert (log[1].endpoint, log[1].address) == ("/socket", "/socket")


async def test_a_random_chooser() -> None:
    """Each endpoint once a round still, in an order that changes."""
    random.seed(20)
    FakeNetwork()
    log = Log()
    places = [A, B, C]
    await failure_of(
        Connector(endpoints=places, chooser="random", backoff=[0] * 29, on_attempt=log)
    )
    order = log.endpoints()
    rounds = [tuple(order[n : n + 3]) for n in range(0, len(order), 3)]
    assert len(rounds) == 30
    assert all(sorted(one) == sorted(places) for one in rounds)
    assert len(set(rounds)) == 6


async def test_a_callable_chooser() -> None:
    """It gets those that the round has not tried, and its choice is taken."""
    FakeNetwork()
    asked: list[Sequence[Endpoint]] = []

    def last(endpoints: Sequence[Endpoint]) -> Endpoint:
        asked.append(endpoints)
        return endpoints[-1]

    log = Log()
    connector = Connector(endpoints=[A, B, C], chooser=last, backoff=[0], on_attempt=log)
    await failure_of(connector)
    assert log.endpoints() == [C, B, A] * 2
    assert asked == [(A, B, C), (A, B), (A,)] * 2


async def test_a_chooser_that_chooses_none_of_them() -> None:
    """That is told, and leaves connect."""
    network = FakeNetwork()
    connector = Connector(endpoints=[A, B], chooser=lambda endpoints: C)
    with pytest.raises(ValueError, match="the chooser gave"):
        await connector.connect()
    assert network.tried == []
    assert connector.state is ConnectorState.IDLE


# -- one connection after another


@pytest.mark.parametrize("lived", [9.75, 10])
async def test_reset_after(lived: float, autojump_clock: trio.testing.MockClock) -> None:
    """A connection that lived `reset_after` makes the delays begin anew; after a shorter one they
    go on, so that a server that accepts and closes is not asked faster and faster."""
    network_with(CONNECTED)
    connector = Connector(*A, backoff=Backoff(initial=1, jitter="none", reset_after=10))
    waited = []
    await connector.connect()
    for _ in range(4):
        await trio.sleep(lived)
        begun = trio.current_time()
        await connector.connect()
        waited.append(trio.current_time() - begun)
    assert waited == ([1, 1, 1, 1] if lived >= 10 else [1, 2, 4, 8])


async def test_a_flapping_server(autojump_clock: trio.testing.MockClock) -> None:
    """One that accepts and closes at once is asked as rarely as one that refuses."""
    network = network_with(CONNECTED)
    connector = Connector(*A, backoff=Backoff(initial=1, maximum=8, jitter="none"))
    for _ in range(7):
        (await connector.connect()).socket.close()
    assert [time for time, _ in network.tried] == [0, 1, 3, 7, 15, 23, 31]


async def test_failover_after_a_connection(autojump_clock: trio.testing.MockClock) -> None:
    """After a short connection the round goes on with the next endpoint, without a delay; after one
    that lived, it begins with the first endpoint, after the first delay."""
    network = FakeNetwork()
    for place in (A, B, C):
        network.answers[place] = [CONNECTED]
    backoff = Backoff(initial=1, jitter="none", reset_after=10)
    connector = Connector(endpoints=[A, B, C], backoff=backoff)
    for lived in (2, 2, 2, 2, 10, 10, 2):
        await connector.connect()
        await trio.sleep(lived)
    assert [place for _, place in network.tried] == [A, B, C, A, B, A, A]
    # C's round is over, so A waits 1; B lived 10, so A waits 1 again, and again.
    assert [time for time, _ in network.tried] == [0, 2, 4, 7, 9, 20, 31]


async def test_a_cancelled_pause_is_not_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    """Cancelled in the pause after a connection, the next connect pauses, too."""
    network = network_with(CONNECTED)
    connector = Connector(*A, backoff=[5, 7])
    await connector.connect()
    with trio.move_on_after(1):
        await connector.connect()
    assert connector.state is ConnectorState.IDLE
    await connector.connect()
    assert [time for time, _ in network.tried] == [0, 8]


async def test_one_pause_a_connection(autojump_clock: trio.testing.MockClock) -> None:
    """The pause is for the connection that was lost: a connect that failed since asks for none."""
    network = network_with(CONNECTED, REFUSED)
    connector = Connector(*A, backoff=[5, 7], max_attempts=1)
    await connector.connect()
    await failure_of(connector)
    await failure_of(connector)
    assert [time for time, _ in network.tried] == [0, 5, 5]


async def test_the_backoff_ends_between_connections() -> None:
    """A backoff without a further delay allows no second connection."""
    network_with(CONNECTED)
    connector = Connector(*A, backoff=[])
    await connector.connect()
    error = await failure_of(connector)
    assert error.attempts == ()
    assert error.errno is None
    assert "backoff" in str(error)
    assert connector.state is ConnectorState.IDLE


# -- states


async def test_states(autojump_clock: trio.testing.MockClock) -> None:
    """What `state` says in each phase."""
    network_with(failing(errno.ECONNREFUSED, after=2), Answer(after=2))
    connector = Connector(*A, backoff=[2, 2])
    seen: list[ConnectorState] = []

    async def watch() -> None:
        await trio.sleep(1)
        for _ in range(3):
            seen.append(connector.state)
            await trio.sleep(2)

    assert connector.state is ConnectorState.IDLE
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await connector.connect()
        seen.append(connector.state)
    assert seen == [
        ConnectorState.CONNECTING,
        ConnectorState.WAITING,
        ConnectorState.CONNECTING,
        ConnectorState.CONNECTED,
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connector.connect)
        await trio.sleep(1)
        assert connector.state is ConnectorState.WAITING
        await trio.sleep(2)
        assert connector.state is ConnectorState.CONNECTING
        nursery.cancel_scope.cancel()
    assert connector.state is ConnectorState.IDLE


async def test_moves_are_logged(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Every move of the state, for debugging; between endpoints nobody waits."""
    caplog.set_level(logging.DEBUG, "trioreactor.connector")
    network = FakeNetwork()
    network.answers[B] = [REFUSED, CONNECTED]
    await Connector(endpoints=[A, B], backoff=[1]).connect()
    moves = [r.getMessage() for r in caplog.records if "->" in r.getMessage()]
    assert moves == [
        "connector: IDLE -> CONNECTING",
        "connector: CONNECTING -> WAITING",
        "connector: WAITING -> CONNECTING",
        "connector: CONNECTING -> CONNECTED",
    ]


@pytest.mark.parametrize("answer", [REFUSED, HANGS])
async def test_idle_after_it_failed(answer: Answer, autojump_clock: trio.testing.MockClock) -> None:
    """Failed or cancelled, in an attempt or in between, it can be used again."""
    network = network_with(answer)
    connector = Connector(*A, backoff=[100])
    with trio.move_on_after(5):
        await connector.connect()
    assert connector.state is ConnectorState.IDLE
    connector.retry = False
    await failure_of(connector)
    assert connector.state is ConnectorState.IDLE
    network.answers[A] = [CONNECTED]
    await connector.connect()
    assert connector.state is ConnectorState.CONNECTED


async def test_two_at_once() -> None:
    """A second task is told that the first is at it, whichever comes to run first."""
    network = network_with(HANGS)
    connector = Connector(*A)
    results: list[str] = []

    async def connect() -> None:
        try:
            await connector.connect()
        except (trio.BusyResourceError, trio.ClosedResourceError) as error:
            results.append(type(error).__name__)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect)
        nursery.start_soon(connect)
        await trio.testing.wait_all_tasks_blocked()
        assert results == ["BusyResourceError"]
        await connect()
        assert results == ["BusyResourceError"] * 2
        assert connector.state is ConnectorState.CONNECTING
        connector.stop()
    assert results[2:] == ["ClosedResourceError"]
    assert len(network.sockets) == 1
    assert network.open == []


async def test_busy_in_the_backoff() -> None:
    """In the backoff, too, the connector is one task's."""
    network_with(REFUSED)
    connector = Connector(*A, backoff=[1000])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connector.connect)
        await trio.testing.wait_all_tasks_blocked()
        assert connector.state is ConnectorState.WAITING
        with pytest.raises(trio.BusyResourceError):
            await connector.connect()
        nursery.cancel_scope.cancel()


# -- stop


@pytest.mark.parametrize("phase", ["before", "resolving", "attempt", "race", "backoff", "pause"])
async def test_stop(phase: str, autojump_clock: trio.testing.MockClock) -> None:
    """It ends a connect in whatever phase it is, at once, and all to come; idempotent."""
    network = network_with(HANGS if phase in ("attempt", "before") else REFUSED)
    network.names["resolving"] = None
    network.names["race"] = ["192.0.2.7", "192.0.2.8"]
    network.answers["192.0.2.7", 1] = network.answers["192.0.2.8", 1] = [HANGS]
    connector = Connector(phase, 1) if phase in network.names else Connector(*A, backoff=[9, 9])
    if phase == "pause":
        network.answers[A] = [CONNECTED]
        (await connector.connect()).socket.close()
    if phase == "before":
        connector.stop()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 5, connector.stop)
        with pytest.raises(trio.ClosedResourceError):
            await connector.connect()
        assert trio.current_time() == (0 if phase == "before" else 5)
        assert connector.state is ConnectorState.STOPPED
        nursery.cancel_scope.cancel()
    assert network.open == []
    tried = len(network.tried)
    connector.stop()
    with pytest.raises(trio.ClosedResourceError):
        await connector.connect()
    assert len(network.tried) == tried


async def test_stop_after_it_connected() -> None:
    """The connection is its user's, and stays; there will be no other."""
    network = network_with(CONNECTED)
    connector = Connector(*A)
    stream = await connector.connect()
    connector.stop()
    assert network.open == [stream.socket]
    assert connector.state is ConnectorState.STOPPED
    with pytest.raises(trio.ClosedResourceError):
        await connector.connect()


async def test_stop_in_the_turn_of_the_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Connected and stopped in one turn: closed, not leaked."""
    for stop_first in (True, False):
        gate = trio.Event()
        network = network_with(Answer(gate=gate))
        connector = Connector(*A)
        calls = [connector.stop, gate.set] if stop_first else [gate.set, connector.stop]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at, 1, lambda calls=calls: [call() for call in calls])
            with pytest.raises(trio.ClosedResourceError):
                await connector.connect()
        assert len(network.sockets) == 1
        assert network.open == []


async def test_cancelled_beats_stopped() -> None:
    """A task that is cancelled and stopped in one turn is cancelled: nothing hides that."""
    network_with(HANGS)
    connector = Connector(*A)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connector.connect)
            await trio.testing.wait_all_tasks_blocked()
            connector.stop()
            scope.cancel()
    assert scope.cancelled_caught
    assert connector.state is ConnectorState.STOPPED


# -- cancellation


@pytest.mark.parametrize("how", ["cancelled", "stopped"])
async def test_ended_at_every_step(how: str, autojump_clock: trio.testing.MockClock) -> None:
    """Resolving, connecting, racing, in the backoff and at the connection itself: wherever it is
    cancelled, or stopped, no socket and no task stays."""
    seen = set()
    for number in range(500):
        network = FakeNetwork()
        network.names["host"] = ["192.0.2.7", "2001:db8::7", "192.0.2.8"]
        for ip, last in (("192.0.2.7", HANGS), ("2001:db8::7", REFUSED), ("192.0.2.8", CONNECTED)):
            network.answers[ip, 1] = [failing(errno.ECONNREFUSED, after=0.25), REFUSED, last]
        connector = Connector("host", 1, backoff=[1, 1])
        scope = trio.CancelScope()

        def act(connector: Connector = connector, scope: trio.CancelScope = scope) -> None:
            seen.add(connector.state)
            if how == "stopped":
                connector.stop()
            else:
                scope.cancel()

        stream = None
        closed = False
        tasks = living_tasks()
        with scope, at_step(number, act):
            try:
                stream = await connector.connect()
            except trio.ClosedResourceError:
                closed = True
        assert living_tasks() == tasks
        assert network.open == ([] if stream is None else [stream.socket])
        assert closed == (how == "stopped" and stream is None)
        assert scope.cancelled_caught == (how == "cancelled" and stream is None)
        if stream is not None:
            assert connector.state is ConnectorState.CONNECTED
            break
        assert (connector.state is ConnectorState.STOPPED) == (how == "stopped")
    assert number > 30
    assert seen == {ConnectorState.IDLE, ConnectorState.CONNECTING, ConnectorState.WAITING}


async def test_real_connects_cancelled_at_every_turn(tmp_path: Path) -> None:
    """The same with real sockets, refused and connected, TCP and Unix: descriptors and tasks."""
    path = str(tmp_path / "socket")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(path)
            unix.listen(100)
            for good in (tcp.getsockname(), path):
                endpoints = [unused.getsockname(), str(tmp_path / "missing"), good]

                async def attempt(endpoints: list[Endpoint] = endpoints) -> None:
                    conn = await open_tcp_connection(endpoints=endpoints)
                    conn.force_close()

                turns = 0
                while True:
                    async with no_leaks():
                        if not await cancelled_after(turns, attempt):
                            break
                    turns += 1
                assert turns > 3


async def test_a_cancelled_connect_gets_nowhere() -> None:
    """Cancelled beforehand, it asks nobody."""
    network = network_with(CONNECTED)
    with trio.CancelScope() as scope:
        scope.cancel()
        await Connector(*A).connect()
    assert scope.cancelled_caught
    assert network.sockets == []


async def test_connect_is_a_checkpoint() -> None:
    """Also where it has nothing to wait for, and where it raises at once."""
    network_with(CONNECTED)
    connector = Connector(*A)
    with trio.testing.assert_checkpoints():
        await connector.connect()
    connector.stop()
    with trio.testing.assert_checkpoints(), pytest.raises(trio.ClosedResourceError):
        await connector.connect()


# -- options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "pass both host and port, or path=..., or endpoints="),
        ({"host": "a"}, "pass both host and port"),
        ({"port": 1}, "pass both host and port"),
        ({"port": 1, "path": "/a"}, "one of the three"),
        ({"host": "a", "port": 1, "path": "/a"}, "one of the three"),
        ({"host": "a", "port": 1, "endpoints": [A]}, "one of the three"),
        ({"path": "/a", "endpoints": [A]}, "one of the three"),
        ({"endpoints": []}, "pass at least one"),
        ({"endpoints": [("a", 1, 2)]}, r"pass \(host, port\)"),
        ({"host": "a", "port": "80"}, "the port as a number"),
        ({"host": "a", "port": 0}, "a port from 1 to 65535"),
        ({"host": "", "port": 1}, "pass a host name"),
        ({"host": b"a", "port": 1}, "pass the host as text"),
        ({"endpoints": ["a"]}, "path with a slash"),
        ({"path": "/" + "a" * 107}, "at most 107 bytes"),
        ({"path": "/a", "local_address": "localhost"}, "pass an IP address"),
        ({"path": "/a", "local_address": ""}, "pass an IP address"),
        ({"path": "/a", "local_address": 3}, "pass an IP address"),
        ({"path": "/a", "local_address": ["127.0.0.1", 0]}, "pass an IP address"),
        ({"path": "/a", "local_address": ("127.0.0.1", 1, 2)}, "pass an IP address"),
        ({"path": "/a", "local_address": ("127.0.0.1", None)}, "pass an IP address"),
        ({"path": "/a", "local_address": ("127.0.0.1", 65536)}, "pass a port from 0"),
        ({"path": "/a", "local_address": ("127.0.0.1", -1)}, "pass a port from 0"),
        ({"path": "/a", "max_attempts": 0}, "pass at least 1 attempts"),
        ({"path": "/a", "max_attempts": 1.5}, "pass a whole number"),
        ({"path": "/a", "connect_timeout": 0}, "pass more than 0 seconds, or None"),
        ({"path": "/a", "connect_timeout": "1"}, "pass a number of seconds"),
        ({"path": "/a", "on_attempt": 3}, "pass a plain function, or None"),
        ({"path": "/a", "on_attempt": trio.sleep}, "pass a plain function, or None"),
        ({"path": "/a", "socket_options": {}}, "socket_options={}.*pass"),
        ({"path": "/a", "chooser": "round_robin"}, 'pass "in_order", "random" or a function'),
        ({"path": "/a", "backoff": 3}, "pass a Backoff, or an iterable of seconds"),
        ({"path": "/a", "backoff": "12"}, "pass a Backoff, or an iterable of seconds"),
    ],
)
def test_option_mistakes(options: dict[str, Any], text: str) -> None:
    """A mistake is told where it is made, with what to pass instead."""
    with pytest.raises((TypeError, ValueError), match=text):
        Connector(**options)


def test_options_that_are_right() -> None:
    """All at once, and outside of a trio run."""
    connector = Connector(
        endpoints=[A, "/socket", Path("/socket"), "\0abstract"],
        chooser="random",
        backoff=Backoff(),
        connect_timeout=None,
        max_attempts=None,
        retry=False,
        local_address=("::1", 65535),
        socket_options=SocketOptions(),
        on_attempt=None,
    )
    assert connector.state is ConnectorState.IDLE
    assert not connector.retry


def keywords(fn: Callable[..., object]) -> dict[str, object]:
    """Its keyword-only parameters, with their types."""
    hints = typing.get_type_hints(fn)
    return {
        name: hints[name]
        for name, parameter in inspect.signature(fn).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_the_options_types() -> None:
    """`RetryOptions` has just the connector's keyword parameters, with their types, and
    `ConnectOptions` those without another attempt; but for the name, which is their user's own. All
    may be left out."""
    expected = keywords(Connector.__init__)
    assert expected.pop("name") is str
    assert typing.get_type_hints(RetryOptions) == expected
    without_retry = expected.keys() - {"backoff", "max_attempts", "retry"}
    assert typing.get_type_hints(ConnectOptions).keys() == without_retry
    assert not RetryOptions.__required_keys__


# -- open_tcp_connection


async def test_open_tcp_connection() -> None:
    """One connection, made by host and port, that works and leaks nothing."""
    async with no_leaks():
        with socket.create_server(("127.0.0.1", 0)) as server:
            host, port = server.getsockname()
            async with await open_tcp_connection(host, port) as conn:
                assert isinstance(conn, TcpConnection)
                assert conn.peer_address == (host, port)
                accepted, _ = server.accept()
                with accepted:
                    await conn.send_all(b"question")
                    assert accepted.recv(100) == b"question"
                    accepted.sendall(b"answer")
                    assert await conn.receive_some() == b"answer"


async def test_it_does_not_retry(autojump_clock: trio.testing.MockClock) -> None:
    """Of one endpoint one attempt, of several each once."""
    network = FakeNetwork()
    with pytest.raises(ConnectError) as caught:
        await open_tcp_connection(*A)
    assert len(caught.value.attempts) == 1
    log = Log()
    with pytest.raises(ConnectError):
        await open_tcp_connection(endpoints=[A, B, C], on_attempt=log)
    assert log.endpoints() == [A, B, C]
    assert trio.current_time() == 0
    network.answers[A] = [HANGS]
    with pytest.raises(ConnectError):
        await open_tcp_connection(*A, connect_timeout=3)
    assert trio.current_time() == 3


async def test_it_takes_no_retry_options() -> None:
    """What concerns another attempt is a mistake here."""
    for name in ("retry", "backoff", "max_attempts"):
        options: dict[str, Any] = {name: [1]}
        with pytest.raises((TypeError, ValueError), match=name):
            await open_tcp_connection(*A, **options)


async def test_options_reach_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    """Name, watermarks and timeouts are the connection's."""
    # Far more than the kernel takes for one that nobody reads.
    much = bytes(8_000_000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        options: Any = {"socket_options": SocketOptions(send_buffer=4096)}
        async with await open_tcp_connection(
            *place, name="mine", timeouts=Timeouts(write_stall=1), **options
        ) as conn:
            assert conn.name == "mine"
            assert not conn.send(much)
            await conn.wait_closed()
        assert conn.close_reason is CloseReason.WRITE_STALLED
        async with await open_tcp_connection(
            *place, watermarks=Watermarks(limit=1_000_000), **options
        ) as conn:
            with pytest.raises(SendBufferFull):
                conn.send(much)


async def test_options_reach_the_socket() -> None:
    """All the socket's options, on a real one."""
    options = SocketOptions(
        no_delay=False,
        keepalive=Keepalive(idle=7, interval=8, count=9),
        user_timeout=3,
        send_buffer=8192,
        receive_buffer=4096,
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        async with await open_tcp_connection(*address, socket_options=options) as conn:
            sock = conn.stream.socket
            assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000
            # Linux doubles what it is given.
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) in (4096, 8192)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) in (8192, 16384)
        default = await open_tcp_connection(*address, socket_options=SocketOptions(keepalive=False))
        async with default:
            sock = default.stream.socket
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_a_unix_path(tmp_path: Path) -> None:
    """By a path, as text or as a Path, options for TCP and all."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(100)
        places: tuple[Any, ...] = (path, str(path))
        for place in places:
            conn = await open_tcp_connection(path=place, socket_options=SocketOptions())
            async with conn:
                assert conn.peer_address == str(path)
                accepted, _ = server.accept()
                with accepted:
                    await conn.send_all(b"x")
                    assert accepted.recv(10) == b"x"


async def test_options_reach_a_unix_socket() -> None:
    """The buffers, that is; what is TCP's is left out."""
    network = FakeNetwork()
    network.answers["/socket"] = [CONNECTED]
    options = SocketOptions(send_buffer=4096, user_timeout=3)
    await Connector(path="/socket", socket_options=options).connect()
    (sock,) = network.sockets
    before = sock.calls[: sock.calls.index(("connect", "/socket"))]
    assert before == [("setsockopt", socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)]


async def test_a_stream_that_can_be_no_connection() -> None:
    """What making the connection raises leaves no socket open."""
    async with no_leaks():
        with socket.create_server(("127.0.0.1", 0)) as server:
            stream = await Connector(*server.getsockname()).connect()
            wrong: Any = None
            with pytest.raises(AttributeError):
                connection_on(stream, name=None, watermarks=wrong, timeouts=wrong)
            assert stream.socket.fileno() == -1


async def test_the_peer_is_gone_already() -> None:
    """A connection that is lost in the turn it was made is a failed attempt like any other."""

    def lose() -> None:
        (sock,) = network.sockets
        sock.lost = True

    network = network_with(Answer(then=lose), CONNECTED)
    log = Log()
    await Connector(*A, backoff=[0], on_attempt=log).connect()
    assert isinstance(log[0].error, OSError)
    assert log[0].error.errno == errno.ENOTCONN
    assert len(network.open) == 1
