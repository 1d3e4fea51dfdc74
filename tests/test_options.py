"""Options: what is wrong is refused when they are made, with words that say what to pass."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioreactor import Keepalive, Limits, SocketOptions, Timeouts, Watermarks
from trioreactor.send_buffer import SendBuffer

pytestmark = pytest.mark.pure

pure = settings(deadline=None, derandomize=True, max_examples=100)

CLASSES: list[type] = [Watermarks, Timeouts, Keepalive, SocketOptions, Limits]

# What no field with a number takes, and what it should say about it.
NO_NUMBER: list[Any] = ["1", b"1", True, False, [1], 1 + 0j, ...]
NO_COUNT = [*NO_NUMBER, 1.0, 2.5, math.inf, math.nan]


def wrong(cls: type, error: type[Exception], advice: str, **options: Any) -> Any:
    """One case: these options of that class raise this error with that advice."""
    text = ", ".join(f"{name}={value!r:.30}" for name, value in options.items())
    return pytest.param(cls, options, error, advice, id=f"{cls.__name__}({text})")


def not_counts(cls: type, name: str, unit: str) -> list[Any]:
    """Cases of a field that takes whole numbers of a unit."""
    return [
        wrong(cls, TypeError, f"pass a whole number of {unit}", **{name: value})
        for value in NO_COUNT
    ]


def not_seconds(cls: type, name: str, bound: str) -> list[Any]:
    """Cases of a field that takes seconds, or None for off."""
    advice = f"pass {bound} seconds, or None for off"
    return [
        wrong(cls, TypeError, "pass a number of seconds, or None for off", **{name: value})
        for value in NO_NUMBER
    ] + [
        wrong(cls, ValueError, advice, **{name: value})
        for value in (-1, -0.001, math.inf, -math.inf, math.nan)
    ]


WRONG = [
    *not_counts(Watermarks, "high", "bytes"),
    *not_counts(Watermarks, "low", "bytes"),
    *not_counts(Watermarks, "limit", "bytes"),
    *not_counts(Watermarks, "receive_limit", "bytes"),
    wrong(Watermarks, TypeError, "cannot be turned off, pass a number", high=None),
    wrong(Watermarks, TypeError, "cannot be turned off, pass a number", low=None),
    wrong(Watermarks, ValueError, "pass at least 1 bytes", high=0),
    wrong(Watermarks, ValueError, "pass at least 0 bytes", low=-1),
    wrong(Watermarks, ValueError, "pass at least 1024 bytes", limit=0),
    wrong(Watermarks, ValueError, "pass at least 1024 bytes", high=10, low=1, limit=1023),
    wrong(Watermarks, ValueError, "pass at least 1 bytes", receive_limit=0),
    wrong(Watermarks, ValueError, "a quarter of it (16384) is usual", low=65536),
    wrong(Watermarks, ValueError, "pass a low mark below the high one", high=100, low=101),
    wrong(Watermarks, ValueError, "pass a limit of at least the high mark", limit=65535),
    *[
        case
        for name in ("idle", "first_byte", "frame", "write_stall", "handshake")
        for case in not_seconds(Timeouts, name, "more than 0")
    ],
    *not_seconds(Timeouts, "linger", "at least 0"),
    *[
        wrong(Timeouts, ValueError, "pass more than 0 seconds", **{name: 0})
        for name in ("idle", "first_byte", "frame", "write_stall", "handshake")
    ],
    *not_counts(Keepalive, "idle", "seconds"),
    *not_counts(Keepalive, "interval", "seconds"),
    *not_counts(Keepalive, "count", "probes"),
    wrong(Keepalive, TypeError, "cannot be turned off, pass a number", idle=None),
    wrong(Keepalive, TypeError, "cannot be turned off, pass a number", interval=None),
    wrong(Keepalive, TypeError, "cannot be turned off, pass a number", count=None),
    wrong(Keepalive, ValueError, "pass at least 1 seconds", idle=0),
    wrong(Keepalive, ValueError, "pass at least 1 seconds", interval=-1),
    wrong(Keepalive, ValueError, "pass at least 1 probes", count=0),
    *[
        wrong(SocketOptions, TypeError, "pass a bool", **{name: value})
        for name in ("no_delay", "reuse_port")
        for value in (None, 0, 1, "yes")
    ],
    *[
        wrong(SocketOptions, TypeError, "pass True, False or Keepalive(idle=", keepalive=value)
        for value in (None, 0, 1, 60, 60.0, "60", (60, 10, 5))
    ],
    *not_seconds(SocketOptions, "user_timeout", "more than 0"),
    wrong(SocketOptions, ValueError, "pass more than 0 seconds", user_timeout=0),
    *not_counts(SocketOptions, "send_buffer", "bytes"),
    *not_counts(SocketOptions, "receive_buffer", "bytes"),
    *not_counts(SocketOptions, "backlog", "connections"),
    wrong(SocketOptions, ValueError, "pass at least 1 bytes", send_buffer=0),
    wrong(SocketOptions, ValueError, "pass at least 1 bytes", receive_buffer=-1),
    wrong(SocketOptions, ValueError, "pass at least 1 connections", backlog=0),
    *not_counts(Limits, "connections", "connections"),
    *not_counts(Limits, "per_peer", "connections"),
    wrong(Limits, ValueError, "pass at least 1 connections", connections=0),
    wrong(Limits, ValueError, "pass at least 1 connections", per_peer=-5),
    *[
        wrong(Limits, TypeError, "pass connections a second", accept_rate=value)
        for value in NO_NUMBER
    ],
    *[
        wrong(Limits, ValueError, "pass more than 0 connections a second", accept_rate=value)
        for value in (0, 0.0, -1, math.inf, math.nan)
    ],
    *[
        wrong(Limits, ValueError, 'pass "wait" or "reject"', when_full=value)
        for value in ("block", "", None, True, "Wait")
    ],
]


@pytest.mark.parametrize(("cls", "options", "error", "advice"), WRONG)
def test_wrong_values(
    cls: type, options: dict[str, Any], error: type[Exception], advice: str
) -> None:
    """A wrong value is refused at construction: the text names the field and what to pass."""
    with pytest.raises(error, match=re.escape(advice)) as caught:
        cls(**options)
    text = str(caught.value)
    assert text.startswith(f"{cls.__name__}(")
    assert list(options)[-1] in text


def test_no_field_is_forgotten() -> None:
    """Every field of every class is among the wrong values above."""
    tried = {(case.values[0], name) for case in WRONG for name in case.values[1]}
    assert tried == {(cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen(cls: type) -> None:
    """Options are values: they can be compared, hashed and shared, and not be changed."""
    options = cls()
    assert options == cls()
    assert hash(options) == hash(cls())
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, field.name, getattr(options, field.name))
    with pytest.raises((AttributeError, TypeError)):
        options.misspelt = 1


@pytest.mark.parametrize("cls", CLASSES)
def test_keyword_only(cls: type) -> None:
    """Nothing is passed by position, and a misspelt name is refused."""
    with pytest.raises(TypeError, match="positional"):
        cls(1)
    with pytest.raises(TypeError, match="misspelt"):
        cls(misspelt=1)


def test_defaults() -> None:
    """The defaults are those of the documented contract."""
    marks = Watermarks()
    assert (marks.high, marks.low, marks.limit) == (65536, 16384, 67108864)
    assert marks.receive_limit == 1048576
    timeouts = Timeouts()
    assert timeouts.idle is timeouts.first_byte is timeouts.frame is timeouts.write_stall is None
    assert timeouts.handshake == 10
    assert timeouts.linger == 2
    options = SocketOptions()
    assert options.no_delay is True
    assert options.keepalive is True
    assert options.reuse_port is False
    assert options.user_timeout is options.send_buffer is options.receive_buffer is None
    assert options.backlog is None
    limits = Limits()
    assert limits.connections is limits.per_peer is limits.accept_rate is None
    assert limits.when_full == "wait"


def test_none_is_off() -> None:
    """Whatever can be turned off is turned off by None."""
    Watermarks(limit=None, receive_limit=None)
    Timeouts(idle=None, first_byte=None, frame=None, write_stall=None, handshake=None, linger=None)
    SocketOptions(user_timeout=None, send_buffer=None, receive_buffer=None, backlog=None)
    Limits(connections=None, per_peer=None, accept_rate=None)


def test_the_smallest_values() -> None:
    """The bounds themselves are allowed, and so are whole seconds."""
    Watermarks(high=1, low=0, limit=1024, receive_limit=1)
    Watermarks(high=2000, low=1999, limit=2000)
    Timeouts(idle=1e-9, first_byte=1e-9, frame=1e-9, write_stall=1e-9, linger=0)
    Timeouts(idle=1, first_byte=1, frame=1, write_stall=1, linger=2)
    Keepalive(idle=1, interval=1, count=1)
    SocketOptions(user_timeout=1, send_buffer=1, receive_buffer=1, backlog=1)
    SocketOptions(keepalive=Keepalive(idle=1))
    Limits(connections=1, per_peer=1, accept_rate=1e-9, when_full="reject")


@given(
    high=st.integers(1, 2**40), low=st.integers(0, 2**40), limit=st.none() | st.integers(1, 2**40)
)
@pure
def test_limit_holds_a_slice(high: int, low: int, limit: int | None) -> None:
    """Marks are accepted exactly if they are in order; and then a quarter of the limit fits in it.

    What is larger than the limit is sent in quarters of it: if one did not fit, it would wait for
    ever.
    """
    in_order = low < high and (limit is None or limit >= max(high, 1024))
    if not in_order:
        with pytest.raises(ValueError, match="pass"):
            Watermarks(high=high, low=low, limit=limit)
        return
    marks = Watermarks(high=high, low=low, limit=limit)
    if limit is not None:
        assert SendBuffer(marks).can_ever_hold(limit // 4)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: Keepalive(idle=32768), "32767 seconds"),
        (lambda: Keepalive(interval=32768), "32767 seconds"),
        (lambda: Keepalive(count=128), "127 probes"),
        (lambda: SocketOptions(user_timeout=2147484), "2147483 seconds"),
        (lambda: SocketOptions(send_buffer=2**31), "2147483647 bytes"),
        (lambda: SocketOptions(backlog=2**31), "2147483647 connections"),
    ],
)
def test_what_the_kernel_would_refuse(make: Callable[[], object], most: str) -> None:
    """The kernel's own bounds are told at construction, not at the first bind."""
    with pytest.raises(ValueError, match=f"pass at most {most}"):
        make()
