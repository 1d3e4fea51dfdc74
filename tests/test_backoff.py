"""Backoff: delays that grow and are random within exact bounds, and Delays, which walks them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import FrozenInstanceError
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioreactor import Backoff
from trioreactor.backoff import Delays, Jitter

pytestmark = pytest.mark.pure

# The greatest number that a source of chance gives.
ALMOST_ONE = math.nextafter(1, 0)

seconds = st.floats(0.001, 1000)
chance = st.lists(st.floats(0, ALMOST_ONE), min_size=30, max_size=30)
jitters = st.one_of(st.sampled_from(["full", "equal", "none"]), st.floats(0, 1))


def first(backoff: Iterable[float], number: int = 30) -> list[float]:
    """The first *number* delays."""
    return list(islice(backoff, number))


def drawn(numbers: list[float]) -> Callable[[], float]:
    """A source of chance that gives those."""
    return iter(numbers).__next__


def ceilings(backoff: Backoff, number: int = 30) -> list[float]:
    """What the delays would be if chance took nothing away."""
    return [
        min(backoff.maximum, backoff.initial * backoff.multiplier**step) for step in range(number)
    ]


# -- the delays


@given(
    initial=seconds,
    growth=st.floats(1, 1000),
    multiplier=st.floats(1, 10),
    jitter=jitters,
    numbers=chance,
)
def test_bounds(
    initial: float, growth: float, multiplier: float, jitter: Jitter | float, numbers: list[float]
) -> None:
    """No delay is above its ceiling or the maximum, nor below what its jitter must leave of the
    ceiling; the ceilings grow by the multiplier up to the maximum.
    """
    fractions = {"full": 1.0, "equal": 0.5, "none": 0.0}
    fraction = fractions[jitter] if isinstance(jitter, str) else jitter
    backoff = Backoff(
        initial=initial,
        maximum=initial * growth,
        multiplier=multiplier,
        jitter=jitter,
        random=drawn(numbers),
    )
    # Multiplying step by step rounds otherwise than a power does.
    slack = 1e-9
    for delay, ceiling in zip(first(backoff), ceilings(backoff), strict=True):
        assert 0 <= delay <= backoff.maximum
        assert (1 - fraction) * ceiling * (1 - slack) <= delay <= ceiling * (1 + slack)


@given(initial=seconds, growth=st.floats(1, 1000), numbers=chance)
def test_decorrelated_bounds(initial: float, growth: float, numbers: list[float]) -> None:
    """Each delay is between the initial one and three times the one before, or the maximum."""
    maximum = initial * growth
    backoff = Backoff(
        initial=initial, maximum=maximum, jitter="decorrelated", random=drawn(numbers)
    )
    for before, delay in pairwise([initial, *first(backoff)]):
        assert initial <= delay <= min(maximum, 3 * before)


@pytest.mark.parametrize(
    ("jitter", "least", "most"),
    [
        ("full", 0, 1),
        ("equal", 0.5, 1),
        ("none", 1, 1),
        (0, 1, 1),
        (0.2, 0.8, 1),
        (1, 0, 1),
    ],
)
def test_the_bounds_are_reached(jitter: Jitter | float, least: float, most: float) -> None:
    """Chance at its extremes gives the whole ceiling and the least part of it, for every delay."""
    plain = [0.5, 1, 2, 4, 8, 16, 30, 30]
    longest = Backoff(jitter=jitter, random=lambda: 0.0)
    shortest = Backoff(jitter=jitter, random=lambda: ALMOST_ONE)
    assert first(longest, 8) == [most * delay for delay in plain]
    assert first(shortest, 8) == pytest.approx([least * delay for delay in plain], abs=1e-12)


def test_decorrelated_extremes() -> None:
    """Decorrelated delays reach three times the one before, the maximum, and the initial one."""
    longest = Backoff(jitter="decorrelated", random=lambda: ALMOST_ONE)
    assert first(longest, 6) == pytest.approx([1.5, 4.5, 13.5, 30, 30, 30])
    assert first(Backoff(jitter="decorrelated", random=lambda: 0.0), 6) == [0.5] * 6


def test_decorrelated_delays_stay_apart_at_the_maximum() -> None:
    """Those that have come to the maximum are still spread: it is not where they all end up."""
    delays = first(Backoff(jitter="decorrelated", random=random.Random(1).random), 2000)
    assert not any(delay == 30 for delay in delays)
    assert sum(delay > 27 for delay in delays) < len(delays) / 5


@pytest.mark.parametrize("jitter", ["full", "equal", 0.3, "decorrelated"])
def test_chance_is_spread_evenly(jitter: Jitter | float) -> None:
    """A delay is as likely to be in one part of its range as in another."""
    source = random.Random(5).random
    delays = sorted(first(Backoff(jitter=jitter, random=source), 1)[0] for _ in range(4000))
    low, high = {"full": (0, 0.5), "equal": (0.25, 0.5), 0.3: (0.35, 0.5)}.get(jitter, (0.5, 1.5))
    for part in range(1, 10):
        expected = low + (high - low) * part / 10
        assert delays[400 * part] == pytest.approx(expected, abs=(high - low) / 30)


def test_the_defaults() -> None:
    """The delays' ceilings are muduo's, half a second doubled up to thirty, with full jitter."""
    backoff = Backoff()
    assert ceilings(backoff, 8) == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert backoff.jitter == "full"
    assert backoff.reset_after == 10


@pytest.mark.parametrize("jitter", ["full", "equal", 0.3, "decorrelated", "none"])
def test_a_seed(jitter: Jitter | float) -> None:
    """The same seed gives the same delays, another seed others unless there is no chance in it."""

    def delays(seed: int) -> list[float]:
        return first(Backoff(jitter=jitter, random=random.Random(seed).random))

    assert delays(1) == delays(1)
    assert (delays(1) == delays(2)) == (jitter == "none")


@pytest.mark.parametrize("jitter", ["full", "equal", 0.3, "decorrelated", "none"])
def test_each_iteration_begins_anew(jitter: Jitter | float) -> None:
    """Two iterations of one backoff do not know of each other, and each starts at the beginning."""
    backoff = Backoff(initial=1, maximum=1000, jitter=jitter, random=lambda: 0.25)
    one = iter(backoff)
    begun = first(one, 5)
    assert first(backoff, 5) == begun
    assert first(one, 5) == first(backoff, 10)[5:] != begun


def test_it_never_ends() -> None:
    """A backoff has always another delay, also where its ceiling would outgrow every number."""
    steep = Backoff(multiplier=1e300, jitter="none")
    assert first(steep, 5) == [0.5, 30, 30, 30, 30]
    assert first(Backoff(jitter="none"), 5000)[-1] == 30


# -- wrong options


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"initial": 0}, ValueError, r"initial=0\): pass a number of more than 0"),
        ({"initial": -1}, ValueError, r"initial=-1\): pass a number of more than 0"),
        ({"initial": math.nan}, ValueError, r"initial=nan\): pass a number"),
        ({"initial": "1"}, TypeError, r"initial='1'\): pass a number"),
        ({"initial": None}, TypeError, r"initial=None\): pass a number"),
        ({"initial": True}, TypeError, r"initial=True\): pass a number"),
        ({"initial": 31}, ValueError, r"maximum=30.0\): pass a maximum of at least the initial"),
        ({"maximum": 0}, ValueError, r"maximum=0\): pass a number of more than 0"),
        ({"maximum": math.inf}, ValueError, r"maximum=inf\): pass a number"),
        ({"maximum": 0.4}, ValueError, "pass a maximum of at least the initial delay"),
        ({"multiplier": 0.99}, ValueError, r"multiplier=0.99\): pass a number of at least 1"),
        ({"multiplier": math.inf}, ValueError, r"multiplier=inf\): pass a number of at least 1"),
        ({"multiplier": "2"}, TypeError, r"multiplier='2'\): pass a number"),
        ({"jitter": "half"}, ValueError, r'pass "full", "equal", "decorrelated", "none", or a num'),
        ({"jitter": -0.1}, ValueError, r"jitter=-0.1\): pass a number of at least 0"),
        ({"jitter": 1.1}, ValueError, r"jitter=1.1\): pass at most 1"),
        ({"jitter": math.nan}, ValueError, r"jitter=nan\): pass a number"),
        ({"jitter": True}, TypeError, r"jitter=True\): pass a number"),
        ({"jitter": None}, TypeError, r"jitter=None\): pass a number"),
        ({"reset_after": -1}, ValueError, r"reset_after=-1\): pass a number of at least 0"),
        ({"reset_after": None}, TypeError, r"reset_after=None\): pass a number"),
        ({"random": 0.5}, TypeError, r"random=0.5\): pass a function, as random.random"),
        ({"random": random.Random(1)}, TypeError, "pass a function, as random.random"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], says: str) -> None:
    """An option that cannot be fails at construction, and the text says what to pass."""
    with pytest.raises(error, match=says):
        Backoff(**options)


def test_the_least_options() -> None:
    """What stands at the edge of what can be is accepted."""
    backoff = Backoff(initial=1, maximum=1, multiplier=1, jitter=0, reset_after=0)
    assert first(backoff, 3) == [1, 1, 1]


def test_it_cannot_be_changed() -> None:
    """It is frozen, so it may be shared and be a default; its options are named."""
    backoff = Backoff()
    with pytest.raises(FrozenInstanceError):
        backoff.initial = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Backoff(1)  # type: ignore[call-arg]


# -- Delays


class Twice:
    """An iterable, and no more than that."""

    def __iter__(self) -> Iterator[float]:
        return iter([1.0, 2.0])


@pytest.mark.parametrize(
    "backoff", [[1, 2.0], (1, 2), {1: "a", 2: "b"}, range(1, 3), Twice()], ids=repr
)
def test_any_iterable(backoff: Iterable[float]) -> None:
    """Any iterable of delays is taken in turn; None says that there are no more; `restart` begins
    anew.
    """
    delays = Delays(backoff)
    for _ in range(2):
        assert [delays.next() for _ in range(4)] == [1, 2, None, None]
        delays.restart()
    assert delays.next() == 1
    delays.restart()
    assert delays.next() == 1


@pytest.mark.parametrize("make", [iter, lambda given: (delay for delay in given)])
def test_a_one_shot_iterator(make: Callable[[list[float]], Iterable[float]]) -> None:
    """An iterator, or a generator, cannot begin anew: it goes on where it was."""
    delays = Delays(make([1, 2, 3]))
    assert delays.next() == 1
    delays.restart()
    assert [delays.next() for _ in range(3)] == [2, 3, None]
    delays.restart()
    assert delays.next() is None


def test_no_delays() -> None:
    """An empty iterable is a backoff that has ended."""
    assert Delays([]).next() is None


def test_delays_of_a_backoff() -> None:
    """Of a `Backoff` it gives the delays, from the first one after each `restart`."""
    delays = Delays(Backoff(jitter="none"))
    for _ in range(2):
        assert [delays.next() for _ in range(3)] == [0.5, 1, 2]
        delays.restart()


def test_reset_after() -> None:
    """It is the backoff's own; an iterable, which has none, gets the default."""
    assert Delays(Backoff(reset_after=3)).reset_after == 3
    assert Delays([1, 2]).reset_after == Backoff().reset_after


def test_two_connectors_share_a_backoff() -> None:
    """Where one stands says nothing about where another one does."""
    backoff = Backoff(jitter="none")
    one, other = Delays(backoff), Delays(backoff)
    assert [one.next() for _ in range(3)] == [0.5, 1, 2]
    assert other.next() == 0.5


@pytest.mark.parametrize("backoff", [None, 1, 1.5, "0.5", b"1", Backoff])
def test_what_is_no_backoff(backoff: Any) -> None:
    """What cannot be iterated fails at once, as does text, whose characters are no delays."""
    with pytest.raises(TypeError, match="pass a Backoff, or an iterable of seconds"):
        Delays(backoff)


@pytest.mark.parametrize("delay", [-1, -0.001, math.inf, -math.inf, math.nan])
def test_bad_delays(delay: float) -> None:
    """A number that cannot be waited for raises when it comes, and is named."""
    delays = Delays([0.5, delay])
    assert delays.next() == 0.5
    with pytest.raises(ValueError, match=f"the backoff gave {delay!r}: every delay must be 0"):
        delays.next()


@pytest.mark.parametrize("delay", ["1", [1], 1j])
def test_delays_that_are_no_numbers(delay: Any) -> None:
    """What is no number at all raises as clearly."""
    with pytest.raises((TypeError, ValueError), match=r"the backoff gave .* must be"):
        Delays([delay]).next()


def test_no_delay() -> None:
    """Zero is a delay: try again at once."""
    assert Delays([0, 0.0]).next() == 0
