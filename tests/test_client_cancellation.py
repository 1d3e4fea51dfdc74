"""A client ended at every moment there is: nothing leaks (F, T), nothing is miscounted (C)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import address_of, listening, no_leaks, refusing, reset
from trioreactor import ClientStatistics, CloseReason, NotConnected, TcpClient, TcpConnection

# More than the scenario has.
MOST_STEPS = 2000

# How a connection of the scenario ends where nobody interferes.
NATURAL = {CloseReason.PEER_EOF, CloseReason.PEER_RESET, CloseReason.LOCAL_CLOSE}


class Boom(Exception):
    """What the block, or somebody beside the client, raises."""


class Moment(trio.abc.Instrument):
    """Calls *act* after so many steps of all tasks, and looks at the statistics after each step
    from there on. (What is before is the same as without it.)

    It is called by a task of its own, in the next turn: before or after the others, as it happens.
    """

    def __init__(self, steps: int, act: Callable[[], None], client: TcpClient) -> None:
        self._left = steps
        self._act = act
        self._client = client
        self._now = trio.Event()
        self.came = False
        self.faults: list[object] = []

    async def run(self) -> None:
        """To be run beside the scenario."""
        await self._now.wait()
        self._act()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """A task has come to a checkpoint."""
        self._left -= 1
        if self._left >= 0:
            return
        self.came = True
        self._now.set()
        now = self._client.statistics()
        if now.opened - sum(now.closed.values()) != now.active or now.active not in (0, 1):
            self.faults.append(now)


class Scenario:
    """A client that meets, in turn, a refusal, an EOF, a refusal, a reset, and a good server.

    Between them it waits for the backoff. The third connection is the last: the client
    disconnects there by itself.
    """

    def __init__(self, refused: tuple[str, int], good: tuple[str, int]) -> None:
        self.client = TcpClient(
            handler=self.talk, endpoints=[refused, good], backoff=[1.0] * 10, name="c"
        )
        self.body = trio.CancelScope()
        self.failed = trio.Event()

    async def talk(self, conn: TcpConnection) -> None:
        """The handler: ask, and read the answer to its end."""
        await conn.send_all(b"ping")
        async for chunk in conn:
            assert chunk == b"pong"
            if conn.name.endswith("#3"):
                self.client.disconnect()

    async def run(self) -> None:
        await self.client.run()

    async def loop(self) -> None:
        async for conn in self.client:
            async with self.client.session(conn):
                await self.talk(conn)

    async def block(self) -> None:
        async with self.client:
            with self.body, suppress(trio.ClosedResourceError):
                while True:
                    conn = await self.client.wait_connected()
                    await conn.wait_closed()
            if self.failed.is_set():
                raise Boom

    async def bare_block(self) -> None:
        """The block without a handler talks by itself."""
        self.client._handler = None
        async with self.client:
            with self.body, suppress(trio.ClosedResourceError):
                while True:
                    conn = await self.client.wait_connected()
                    # Whoever is first closes it: the peer's EOF in the background, or we here.
                    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await self.talk(conn)
            if self.failed.is_set():
                raise Boom

    def fail(self) -> None:
        """Have the block raise, or a task beside the client."""
        self.failed.set()
        self.body.cancel()


async def answer(listener: trio.SocketListener) -> None:
    """The good server. The first client meets its EOF, the second a reset."""
    for number in count(1):
        async with await listener.accept() as stream:
            with suppress(trio.BrokenResourceError):
                if not await stream.receive_some():
                    continue
                if number == 2:
                    reset(stream.socket)
                    continue
                await stream.send_all(b"pong")
                if number == 3:
                    async for _ in stream:
                        pass


Form = Callable[[Scenario], Awaitable[None]]
Act = Callable[[Scenario, trio.CancelScope], None]


def _stop(scenario: Scenario, scope: trio.CancelScope) -> None:
    scenario.client.stop()


def _disconnect(scenario: Scenario, scope: trio.CancelScope) -> None:
    scenario.client.disconnect()


def _cancel(scenario: Scenario, scope: trio.CancelScope) -> None:
    scope.cancel()


def _fail(scenario: Scenario, scope: trio.CancelScope) -> None:
    scenario.fail()


FORMS = [Scenario.run, Scenario.loop, Scenario.block, Scenario.bare_block]


async def play(form: Form, act: Act, steps: int) -> ClientStatistics | None:
    """The scenario with *act* after so many steps; None if it had ended by itself before."""
    async with no_leaks(), listening() as listener:
        with refusing() as refused:
            scenario = Scenario(refused.getsockname(), address_of(listener))
            client = scenario.client
            boom = None
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(answer, listener)
                    scope = trio.CancelScope()
                    moment = Moment(steps, lambda: act(scenario, scope), client)
                    nursery.start_soon(moment.run)
                    trio.lowlevel.add_instrument(moment)
                    try:
                        with scope:
                            await played(form, scenario)
                    except Boom as error:
                        boom = error
                    finally:
                        trio.lowlevel.remove_instrument(moment)
                    nursery.cancel_scope.cancel()
            assert not moment.faults
            assert (boom is not None) <= (act is _fail)
            assert scope.cancelled_caught <= (act is _cancel)
            assert client.connection is None
            # A loop that was left by an error might be begun again: it has not ended for good.
            might_go_on = form is Scenario.loop and act in (_cancel, _fail)
            with pytest.raises((trio.ClosedResourceError, *([NotConnected] * might_go_on))):
                client.send(b"x")
            return client.statistics() if moment.came else None


async def played(form: Form, scenario: Scenario) -> None:
    """*form* as a task's whole doing, beside one that can raise."""
    if form in (Scenario.block, Scenario.bare_block):
        await form(scenario)
        return
    try:
        async with trio.open_nursery() as nursery:

            async def beside() -> None:
                await scenario.failed.wait()
                raise Boom

            nursery.start_soon(beside)
            await form(scenario)
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:
        (error,) = group.exceptions
        raise error from None


@pytest.mark.parametrize("act", [_stop, _disconnect, _cancel, _fail])
@pytest.mark.parametrize("form", FORMS)
async def test_ended_at_every_moment(form: Form, act: Act, autojump_clock: MockClock) -> None:
    """Whatever ends it, wherever it is: it ends, raises what is right, and all is counted."""
    opened = set()
    closed: set[CloseReason] = set()
    for steps in range(MOST_STEPS):
        statistics = await play(form, act, steps)
        if statistics is None:
            break
        assert statistics.active == 0
        assert sum(statistics.closed.values()) == statistics.opened
        opened.add(statistics.opened)
        unnatural = set(statistics.closed) - NATURAL
        assert sum(statistics.closed[reason] for reason in unnatural) <= 1
        closed |= unnatural
    else:
        raise AssertionError("it never ends")
    assert steps > 50
    # It was ended in every phase, and each way to end it at once has its own reason.
    assert opened == {0, 1, 2, 3}
    assert (
        closed
        == {
            _stop: {CloseReason.FORCED},
            _disconnect: set(),
            _cancel: {CloseReason.CANCELLED},
            _fail: {CloseReason.CANCELLED},
        }[act]
    )


@pytest.mark.parametrize("form", FORMS)
async def test_the_scenario_by_itself(form: Form, autojump_clock: MockClock) -> None:
    """Undisturbed it meets two refusals at least, an EOF, a reset and its own end."""
    async with listening() as listener, trio.open_nursery() as nursery:
        nursery.start_soon(answer, listener)
        with refusing() as refused:
            scenario = Scenario(refused.getsockname(), address_of(listener))
            moment = Moment(0, lambda: None, scenario.client)
            trio.lowlevel.add_instrument(moment)
            await played(form, scenario)
            trio.lowlevel.remove_instrument(moment)
        nursery.cancel_scope.cancel()
    assert moment.came
    assert not moment.faults
    statistics = scenario.client.statistics()
    assert statistics.opened == 3
    assert statistics.failures == {"ECONNREFUSED": 3}
    assert statistics.closed[CloseReason.PEER_RESET] == 1
