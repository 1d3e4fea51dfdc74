"""Backoff: how long to wait before trying again, so that a crowd does not come back as one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Jitter = Literal["full", "equal", "decorrelated", "none"]

# What each kind takes away from a delay at most, as a part of it.
_FRACTIONS = {"full": 1.0, "equal": 0.5, "none": 0.0}

# Decorrelated jitter grows by chance, up to this many times the delay before. (the AWS
# Architecture Blog's "Exponential Backoff And Jitter", where the three kinds have their names)
_DECORRELATED_GROWTH = 3.0


def _check(name: str, value: object, least: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Backoff({name}={value!r}): pass a number")
    if not math.isfinite(value) or value < least or (above and value == least):
        bound = f"more than {least:g}" if above else f"at least {least:g}"
        raise ValueError(f"Backoff({name}={value!r}): pass a number of {bound}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """An endless series of delays in seconds, growing and random. Iterate to get them.

    Each iteration begins anew. Wherever a `Backoff` is taken, so is any other iterable of delays;
    when one of those ends, so do the attempts.
    """

    initial: float = 0.5
    """The first delay's ceiling, seconds. (muduo)"""
    maximum: float = 30.0
    """No delay is longer, seconds. (muduo)"""
    multiplier: float = 2.0
    """What each ceiling is multiplied by for the next. Decorrelated jitter does not use it.
    (muduo)"""
    jitter: Jitter | float = "full"
    """How chance shortens a delay. ``"full"``: anything up to the ceiling. ``"equal"``: at least
    half of it. A number from 0 to 1: at most this part is taken away. ``"none"``: nothing, and
    clients that fail together come back together. ``"decorrelated"``: anything from `initial` to
    three times the delay before. (full: it spreads a crowd the widest from the first attempt on)"""
    reset_after: float = 10.0
    """A connection that lived this many seconds makes the delays begin anew; a shorter one does
    not. (long enough to tell a server that works from one that accepts and closes)"""
    random: Callable[[], float] = random.random
    """Where chance comes from: uniform from 0 to less than 1. For a seed of your own,
    ``random.Random(seed).random``."""

    def __post_init__(self) -> None:
        _check("initial", self.initial, 0, above=True)
        _check("maximum", self.maximum, 0, above=True)
        _check("multiplier", self.multiplier, 1)
        _check("reset_after", self.reset_after, 0)
        if self.maximum < self.initial:
            raise ValueError(
                f"Backoff(initial={self.initial!r}, maximum={self.maximum!r}): pass a maximum of "
                "at least the initial delay"
            )
        if isinstance(self.jitter, str):
            if self.jitter != "decorrelated" and self.jitter not in _FRACTIONS:
                raise ValueError(
                    f'Backoff(jitter={self.jitter!r}): pass "full", "equal", "decorrelated", '
                    '"none", or a number from 0 to 1'
                )
        else:
            _check("jitter", self.jitter, 0)
            if self.jitter > 1:
                raise ValueError(f"Backoff(jitter={self.jitter!r}): pass at most 1")
        if not callable(self.random):
            raise TypeError(f"Backoff(random={self.random!r}): pass a function, as random.random")

    def __iter__(self) -> Iterator[float]:
        """Begin anew."""
        return self._decorrelated() if self.jitter == "decorrelated" else self._exponential()

    def _exponential(self) -> Iterator[float]:
        jitter = self.jitter
        fraction = _FRACTIONS[jitter] if isinstance(jitter, str) else jitter
        ceiling = self.initial
        while True:
            yield ceiling * (1 - fraction * self.random())
            ceiling = min(self.maximum, ceiling * self.multiplier)

    def _decorrelated(self) -> Iterator[float]:
        delay = self.initial
        while True:
            # The ceiling is cut, not the delay: cut delays would all be the maximum, and the
            # clients that have it would be in step again.
            ceiling = min(self.maximum, delay * _DECORRELATED_GROWTH)
            delay = self.initial + (ceiling - self.initial) * self.random()
            yield delay


class Delays:
    """Where one connector stands in its backoff."""

    __slots__ = ("_backoff", "_iterator", "reset_after")

    def __init__(self, backoff: Backoff | Iterable[float]) -> None:
        if isinstance(backoff, (str, bytes)) or not isinstance(backoff, Iterable):
            raise TypeError(f"backoff={backoff!r}: pass a Backoff, or an iterable of seconds")
        self._backoff = backoff
        self._iterator = iter(backoff)
        self.reset_after = (backoff if isinstance(backoff, Backoff) else Backoff()).reset_after

    def next(self) -> float | None:
        """The next delay; None if there are no more."""
        try:
            delay = next(self._iterator)
        except StopIteration:
            return None
        number = isinstance(delay, (int, float)) and not isinstance(delay, bool)
        if not number or not 0 <= delay < math.inf:
            raise ValueError(f"the backoff gave {delay!r}: every delay must be 0 seconds or more")
        return delay

    def restart(self) -> None:
        """Begin anew. A one-shot iterator cannot, and goes on where it was."""
        self._iterator = iter(self._backoff)
