"""ConnectionLimiter: exact counts, one share for each peer, and a steady rate."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trio.testing import MockClock, wait_all_tasks_blocked

from trioreactor import Limits, SocketAddress, limits
from trioreactor.limits import ConnectionLimiter

pytestmark = pytest.mark.pure

pure = settings(deadline=None, derandomize=True, max_examples=50)

ONE: SocketAddress = ("192.0.2.1", 1000)
OTHER: SocketAddress = ("192.0.2.2", 1000)


def acquire_all(limiter: ConnectionLimiter, most: int = 10000) -> int:
    """Take permits until there are none; how many there were."""
    for taken in range(most):
        if limiter.try_acquire() is not None:
            return taken
    raise AssertionError(f"more than {most} permits")


class Waiter:
    """A task that waits for room, and when there was some."""

    def __init__(self, *, enter: bool = False) -> None:
        self.at: float | None = None
        # Whether to do as an accept loop does: take the permit, or wait again.
        self._enter = enter

    async def __call__(self, limiter: ConnectionLimiter) -> None:
        await limiter.wait_for_room()
        while self._enter and limiter.try_acquire() is not None:
            await limiter.wait_for_room()
        self.at = trio.current_time()


# -- connections


def test_no_limits() -> None:
    """Without limits everybody may come in, as often as they like, with no clock asked."""
    limiter = ConnectionLimiter(Limits())
    for _ in range(1000):
        assert limiter.try_acquire() is None
        assert limiter.try_enter(ONE)


def test_exactly_as_many_as_allowed() -> None:
    """There are as many permits as connections are allowed, and each end frees exactly one."""
    limiter = ConnectionLimiter(Limits(connections=5))
    assert acquire_all(limiter) == 5
    assert limiter.try_acquire() == "connections"
    for address in (ONE, OTHER):
        limiter.try_enter(address)
        limiter.leave(address)
        assert acquire_all(limiter) == 1
    limiter.release()
    limiter.give_back()
    assert acquire_all(limiter) == 2


class LimiterModel(RuleBasedStateMachine):
    """A limiter beside the list of who is in."""

    peers: tuple[SocketAddress, ...] = (
        ONE,
        OTHER,
        ("2001:db8::1", 1, 0, 0),
        "/run/unix.sock",
    )

    @initialize(connections=st.none() | st.integers(1, 5), per_peer=st.none() | st.integers(1, 3))
    def start(self, connections: int | None, per_peer: int | None) -> None:
        self.limits = Limits(connections=connections, per_peer=per_peer)
        self.limiter = ConnectionLimiter(self.limits)
        self.permits = 0
        self.inside: list[SocketAddress] = []

    @rule()
    def acquire(self) -> None:
        most = self.limits.connections
        total = self.permits + len(self.inside)
        expected = "connections" if most is not None and total >= most else None
        assert self.limiter.try_acquire() == expected
        self.permits += expected is None

    @precondition(lambda self: self.permits)
    @rule(used=st.booleans())
    def nobody_came(self, used: bool) -> None:
        self.limiter.give_back() if used else self.limiter.release()
        self.permits -= 1

    @precondition(lambda self: self.permits)
    @rule(peer=st.sampled_from(peers))
    def enter(self, peer: SocketAddress) -> None:
        most = self.limits.per_peer
        room = isinstance(peer, str) or most is None or self.inside.count(peer) < most
        assert self.limiter.try_enter(peer) == room
        self.permits -= 1
        if room:
            self.inside.append(peer)
        else:
            self.limiter.release()

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        peer = data.draw(st.sampled_from(self.inside))
        self.limiter.leave(peer)
        self.inside.remove(peer)

    @rule(connections=st.none() | st.integers(1, 5), per_peer=st.none() | st.integers(1, 3))
    def change(self, connections: int | None, per_peer: int | None) -> None:
        self.limits = self.limiter.limits = Limits(connections=connections, per_peer=per_peer)
        assert self.limiter.limits is self.limits

    @invariant()
    def nothing_is_kept(self) -> None:
        """The peers that are remembered are those that are in."""
        if hasattr(self, "limiter"):
            assert self.limiter._peers == Counter(
                peer[0] if isinstance(peer[0], str) and ":" not in peer[0] else "2001:db8::/64"
                for peer in self.inside
                if not isinstance(peer, str)
            )
            assert 0 not in self.limiter._peers.values()


LimiterModel.TestCase.settings = settings(
    deadline=None, derandomize=True, max_examples=60, stateful_step_count=40
)
TestLimiterModel = LimiterModel.TestCase


async def test_waiting_for_a_connection_to_end(autojump_clock: MockClock) -> None:
    """Who waits for room waits until a connection ends, and not until any time."""
    limiter = ConnectionLimiter(Limits(connections=2))
    acquire_all(limiter)
    limiter.try_enter(ONE)
    waiter = Waiter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter, limiter)
        await trio.sleep(1000)
        assert waiter.at is None
        limiter.leave(ONE)
    assert waiter.at == trio.current_time()
    assert acquire_all(limiter) == 1


@pytest.mark.parametrize("end", ["leave", "release", "give_back"])
async def test_every_end_lets_one_in(end: str, autojump_clock: MockClock) -> None:
    """However a permit comes back, one of those who wait for it gets it, and only one."""
    limiter = ConnectionLimiter(Limits(connections=3))
    acquire_all(limiter)
    for _ in range(3):
        limiter.try_enter(ONE)
    waiters = [Waiter(enter=True) for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for waiter in waiters:
            nursery.start_soon(waiter, limiter)
        await wait_all_tasks_blocked()
        for entered in (1, 2, 3):
            getattr(limiter, end)(*([ONE] if end == "leave" else []))
            await wait_all_tasks_blocked()
            assert sum(waiter.at is not None for waiter in waiters) == entered
            assert limiter.try_acquire() == "connections"


async def test_room_is_everybodys(autojump_clock: MockClock) -> None:
    """Of several who wait, one that does not use the room keeps it from nobody."""
    limiter = ConnectionLimiter(Limits(connections=1))
    acquire_all(limiter)
    waiters = [Waiter() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for waiter in waiters:
            nursery.start_soon(waiter, limiter)
        await trio.sleep(5)
        limiter.release()
    assert [waiter.at for waiter in waiters] == [trio.current_time()] * 3


@pytest.mark.parametrize("first_has_somebody", [True, False])
async def test_an_unused_permit(first_has_somebody: bool, autojump_clock: MockClock) -> None:
    """A waiter that finds nobody to accept gives its permit back, and the other one gets it."""
    limiter = ConnectionLimiter(Limits(connections=1))
    acquire_all(limiter)
    entered = trio.Event()

    async def accept(somebody_there: bool) -> None:
        while True:
            await limiter.wait_for_room()
            if limiter.try_acquire() is not None:
                continue
            if somebody_there:
                entered.set()
                return
            limiter.give_back()
            # Until somebody comes here, which is never.
            await trio.sleep_forever()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, first_has_somebody)
            await wait_all_tasks_blocked()
            nursery.start_soon(accept, not first_has_somebody)
            await wait_all_tasks_blocked()
            limiter.release()
            await entered.wait()
            nursery.cancel_scope.cancel()


async def test_wait_for_room_checkpoints(autojump_clock: MockClock) -> None:
    """It is a checkpoint also when there is room."""
    with trio.testing.assert_checkpoints():
        await ConnectionLimiter(Limits()).wait_for_room()
    with trio.testing.assert_checkpoints():
        await ConnectionLimiter(Limits(connections=1, accept_rate=1)).wait_for_room()


async def test_a_cancelled_wait_takes_nothing(autojump_clock: MockClock) -> None:
    """Who gives up waiting has no permit and is in nobody's way."""
    limiter = ConnectionLimiter(Limits(connections=1))
    acquire_all(limiter)
    with trio.move_on_after(1) as scope:
        await limiter.wait_for_room()
    assert scope.cancelled_caught
    limiter.release()
    await limiter.wait_for_room()
    assert acquire_all(limiter) == 1


@pytest.mark.parametrize("limits", [Limits(connections=1), Limits(accept_rate=1 / 3600)])
async def test_closing_ends_every_wait(limits: Limits, autojump_clock: MockClock) -> None:
    """Once nobody will be let in any more, nobody waits for it."""
    limiter = ConnectionLimiter(limits)
    acquire_all(limiter)
    waiters = [Waiter(), Waiter()]
    async with trio.open_nursery() as nursery:
        for waiter in waiters:
            nursery.start_soon(waiter, limiter)
        await trio.sleep(5)
        limiter.close()
    begun = trio.current_time()
    assert [waiter.at for waiter in waiters] == [begun] * 2
    with trio.testing.assert_checkpoints():
        await limiter.wait_for_room()
    assert trio.current_time() == begun


# -- one peer


@pytest.mark.parametrize(
    ("first", "same", "different"),
    [
        (ONE, ("192.0.2.1", 2000), OTHER),
        (("::ffff:192.0.2.1", 1, 0, 0), ONE, ("::ffff:192.0.2.2", 1, 0, 0)),
        (
            ("2001:db8:0:1::1", 1, 0, 0),
            ("2001:db8:0:1:ffff:ffff:ffff:ffff", 2, 0, 0),
            ("2001:db8:0:2::1", 1, 0, 0),
        ),
        (("fe80::1%lo", 1, 0, 1), ("fe80::2%eth0", 1, 0, 2), ("fd00::1", 1, 0, 0)),
    ],
    ids=["IPv4", "IPv4 in IPv6", "IPv6", "link-local"],
)
def test_per_peer(first: SocketAddress, same: SocketAddress, different: SocketAddress) -> None:
    """A peer's share is its own, whichever of its addresses it uses; leaving frees a place."""
    limiter = ConnectionLimiter(Limits(per_peer=2))
    assert limiter.try_enter(first)
    assert limiter.try_enter(same)
    assert not limiter.try_enter(first)
    assert not limiter.try_enter(same)
    assert limiter.try_enter(different)
    limiter.leave(same)
    assert limiter.try_enter(first)
    assert not limiter.try_enter(same)


@pytest.mark.parametrize("address", ["", "/run/server.sock", b"\0abstract"])
def test_unix_peers_have_no_share(address: SocketAddress) -> None:
    """Peers of a Unix socket cannot be told apart, so `per_peer` lets them all in."""
    limiter = ConnectionLimiter(Limits(per_peer=1, connections=5))
    for _ in range(acquire_all(limiter)):
        assert limiter.try_enter(address)
    limiter.leave(address)
    assert acquire_all(limiter) == 1


def test_per_peer_counts_those_from_before() -> None:
    """A share that is introduced later counts the connections that are there already."""
    limiter = ConnectionLimiter(Limits())
    for _ in range(3):
        assert limiter.try_enter(ONE)
    limiter.limits = Limits(per_peer=3)
    assert not limiter.try_enter(ONE)
    limiter.leave(ONE)
    assert limiter.try_enter(ONE)


def test_a_signal_handler_may_ask() -> None:
    """Wherever a signal comes, who was turned away can be told: nobody waits for themselves."""
    limiter = ConnectionLimiter(Limits(per_peer=1))
    asked: list[dict[str, int]] = []

    def at_each_line(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != limits.__file__:
            return None
        if event == "line":
            asked.append(limiter.rejected())
        return at_each_line

    def use() -> None:
        sys.settrace(at_each_line)
        limiter.try_enter(ONE)
        limiter.reject("per_peer")
        limiter.leave(ONE)

    # Others are not traced, and one that waits for ever holds up nobody.
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert asked[0] == {}
    assert asked[-1] == {"per_peer": 1}


# -- the rate


async def test_a_second_of_the_rate_at_once(autojump_clock: MockClock) -> None:
    """A rate allows one second's worth at once, then one each time its share has passed."""
    limiter = ConnectionLimiter(Limits(accept_rate=10))
    assert acquire_all(limiter) == 10
    assert limiter.try_acquire() == "accept_rate"
    for _ in range(25):
        begun = trio.current_time()
        await limiter.wait_for_room()
        assert trio.current_time() - begun == pytest.approx(0.1)
        assert acquire_all(limiter) == 1


async def test_a_rate_below_one_a_second(autojump_clock: MockClock) -> None:
    """A rate of one in four seconds allows one at once and the next after four seconds."""
    limiter = ConnectionLimiter(Limits(accept_rate=0.25))
    assert acquire_all(limiter) == 1
    begun = trio.current_time()
    await limiter.wait_for_room()
    assert trio.current_time() - begun == pytest.approx(4)
    assert acquire_all(limiter) == 1


async def test_quiet_times_save_one_second(autojump_clock: MockClock) -> None:
    """After a day without visitors no more than one second's worth may come at once."""
    limiter = ConnectionLimiter(Limits(accept_rate=5))
    assert acquire_all(limiter) == 5
    await trio.sleep(86400)
    assert acquire_all(limiter) == 5


async def test_a_token_given_back(autojump_clock: MockClock) -> None:
    """A permit that nobody used costs nothing of the rate, and cannot be hoarded."""
    limiter = ConnectionLimiter(Limits(accept_rate=3))
    assert acquire_all(limiter) == 3
    limiter.give_back()
    assert acquire_all(limiter) == 1
    for _ in range(3):
        limiter.give_back()
    await trio.sleep(10)
    assert limiter.try_acquire() is None
    limiter.give_back()
    assert acquire_all(limiter) == 3


async def test_a_connection_that_ends_gives_no_token(autojump_clock: MockClock) -> None:
    """The rate counts who came, however short they stayed."""
    limiter = ConnectionLimiter(Limits(accept_rate=2))
    for _ in range(acquire_all(limiter)):
        limiter.try_enter(ONE)
        limiter.leave(ONE)
    assert limiter.try_acquire() == "accept_rate"


async def test_full_costs_no_token(autojump_clock: MockClock) -> None:
    """An attempt at a full house does not use up the rate."""
    limiter = ConnectionLimiter(Limits(connections=1, accept_rate=2))
    assert limiter.try_acquire() is None
    for _ in range(5):
        assert limiter.try_acquire() == "connections"
    limiter.release()
    assert limiter.try_acquire() is None


async def test_both_limits_hold(autojump_clock: MockClock) -> None:
    """Who waits for room with both limits set waits until both allow it."""
    limiter = ConnectionLimiter(Limits(connections=1, accept_rate=0.1))
    begun = trio.current_time()
    acquire_all(limiter)
    waiter = Waiter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter, limiter)
        await trio.sleep(5)
        limiter.release()
        await wait_all_tasks_blocked()
        assert waiter.at is None
    assert waiter.at == pytest.approx(begun + 10)
    assert limiter.try_acquire() is None


@given(rate=st.floats(0.1, 50), waits=st.lists(st.floats(0, 5), max_size=40))
@pure
def test_the_rate_holds_over_any_time(rate: float, waits: list[float]) -> None:
    """However the visitors come, in no span of time are there more than the burst and its share."""

    async def main() -> list[tuple[float, int]]:
        limiter = ConnectionLimiter(Limits(accept_rate=rate))
        arrivals = []
        for wait in waits:
            await trio.sleep(wait)
            arrivals.append((trio.current_time(), acquire_all(limiter)))
        return arrivals

    arrivals = trio.run(main, clock=MockClock(autojump_threshold=0))
    burst = max(1, rate)
    for first, (begun, _) in enumerate(arrivals):
        came = 0
        for at, number in arrivals[first:]:
            came += number
            assert came <= burst + (at - begun) * rate + 1e-6


@given(rate=st.floats(0.1, 50), n=st.integers(1, 40))
@pure
def test_the_rate_is_reached(rate: float, n: int) -> None:
    """Who always waits for room gets in at the full rate, with one wait for each."""

    async def main() -> None:
        limiter = ConnectionLimiter(Limits(accept_rate=rate))
        acquire_all(limiter)
        begun = trio.current_time()
        for _ in range(n):
            await limiter.wait_for_room()
            assert limiter.try_acquire() is None
        # What was left over of the first second's worth shortens the first wait.
        assert (n - 1) / rate - 1e-6 <= trio.current_time() - begun <= n / rate + 1e-6

    trio.run(main, clock=MockClock(autojump_threshold=0))


# -- changes while somebody waits


@pytest.mark.parametrize("more", [Limits(), Limits(connections=3), Limits(connections=100)])
async def test_raising_a_limit_wakes_all(more: Limits, autojump_clock: MockClock) -> None:
    """Raising the number of connections lets those in who wait for it, at once."""
    limiter = ConnectionLimiter(Limits(connections=2))
    acquire_all(limiter)
    waiters = [Waiter(), Waiter()]
    async with trio.open_nursery() as nursery:
        for waiter in waiters:
            nursery.start_soon(waiter, limiter)
        await trio.sleep(10)
        limiter.limits = more
    assert [waiter.at for waiter in waiters] == [trio.current_time()] * 2
    assert limiter.try_acquire() is None


@pytest.mark.parametrize(
    "limits",
    [
        Limits(connections=1, when_full="reject"),
        Limits(accept_rate=1 / 3600, when_full="reject"),
    ],
)
async def test_rejecting_ends_the_wait(limits: Limits, autojump_clock: MockClock) -> None:
    """Once newcomers are to be turned away nobody waits for room, but there is none either."""
    limiter = ConnectionLimiter(replace(limits, when_full="wait"))
    acquire_all(limiter)
    waiter = Waiter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter, limiter)
        await trio.sleep(10)
        assert waiter.at is None
        limiter.limits = limits
    assert waiter.at == trio.current_time()
    assert limiter.try_acquire() is not None


async def test_a_change_that_does_not_help(autojump_clock: MockClock) -> None:
    """New limits that leave no room leave those waiting who wait."""
    limiter = ConnectionLimiter(Limits(connections=2))
    acquire_all(limiter)
    waiter = Waiter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter, limiter)
        await wait_all_tasks_blocked()
        limiter.limits = Limits(connections=1)
        await trio.sleep(10)
        limiter.release()
        await trio.sleep(10)
        # One is still there, and one is allowed.
        assert waiter.at is None
        limiter.release()
    assert waiter.at == trio.current_time()


async def test_lowering_a_limit(autojump_clock: MockClock) -> None:
    """Lowering closes nobody: newcomers wait until there are fewer than the new number."""
    limiter = ConnectionLimiter(Limits(connections=5))
    acquire_all(limiter)
    limiter.limits = Limits(connections=2)
    for _ in range(3):
        limiter.release()
        assert limiter.try_acquire() == "connections"
    limiter.release()
    assert acquire_all(limiter) == 1


async def test_lifting_the_rate_ends_the_wait(autojump_clock: MockClock) -> None:
    """Who waits for an hour because of the rate comes in when the rate is lifted."""
    limiter = ConnectionLimiter(Limits(accept_rate=1 / 3600))
    acquire_all(limiter)
    waiter = Waiter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter, limiter)
        await trio.sleep(10)
        assert waiter.at is None
        limiter.limits = Limits()
    assert waiter.at == trio.current_time()


async def test_another_rate(autojump_clock: MockClock) -> None:
    """A new rate holds from then on: no hoard of the old one is left, and waits are shorter."""
    limiter = ConnectionLimiter(Limits(accept_rate=1000))
    assert limiter.try_acquire() is None
    limiter.limits = Limits(accept_rate=2)
    assert acquire_all(limiter) == 2
    waiter = Waiter()
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter, limiter)
        await wait_all_tasks_blocked()
        limiter.limits = Limits(accept_rate=8)
    assert waiter.at == pytest.approx(begun + 1 / 8)


async def test_a_rate_introduced_later(autojump_clock: MockClock) -> None:
    """A rate set on a running server is kept from its first moment."""
    limiter = ConnectionLimiter(Limits())
    await trio.sleep(3600)
    limiter.limits = Limits(accept_rate=10)
    assert acquire_all(limiter) <= 10
    await limiter.wait_for_room()
    assert acquire_all(limiter) == 1
