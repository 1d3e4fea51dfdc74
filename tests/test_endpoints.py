"""Endpoints: what can be one, the rounds in which they are tried, and what an attempt says."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trioreactor import ConnectAttempt
from trioreactor.connect_options import places
from trioreactor.endpoints import Chooser, Endpoint, Rounds, check_endpoint

pytestmark = pytest.mark.pure

A = ("a.example", 1)
B = ("b.example", 2)
C = "/run/c.sock"
ALL: list[Endpoint] = [A, B, C]


def a_round(rounds: Rounds) -> list[Endpoint]:
    """One whole round."""
    assert rounds.complete
    tried = [rounds.next()]
    while not rounds.complete:
        tried.append(rounds.next())
    return tried


def last(endpoints: Sequence[Endpoint]) -> Endpoint:
    """A chooser of one's own."""
    return endpoints[-1]


# -- what can be an endpoint


class Name(str):
    """A kind of text."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (("example.org", 80), ("example.org", 80)),
        (("::1", 1), ("::1", 1)),
        (("192.0.2.1", 65535), ("192.0.2.1", 65535)),
        ((Name("example.org"), 80), ("example.org", 80)),
        (("example.org", socket.SOCK_STREAM), ("example.org", 1)),
        ("/run/app.sock", "/run/app.sock"),
        ("./app.sock", "./app.sock"),
        ("\0abstract", "\0abstract"),
        ("/" + "x" * 106, "/" + "x" * 106),
        ("/\N{SNOWMAN}", "/\N{SNOWMAN}"),
    ],
)
def test_what_can_be_one(given: Any, taken: Endpoint) -> None:
    """A host and a port, or a Unix path."""
    assert check_endpoint(given) == taken
    assert type(check_endpoint(given)) is type(taken)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("example.org", ValueError, r"pass \(host, port\), or a Unix socket's path with a slash"),
        ("example.org:80", ValueError, r"'example.org:80': pass \(host, port\), or a Unix"),
        ("app.sock", ValueError, "a Unix socket's path with a slash"),
        ("", ValueError, r"'': pass \(host, port\)"),
        ("/" + "x" * 107, ValueError, "a Unix socket's path has at most 107 bytes"),
        ("/" + "\N{SNOWMAN}" * 36, ValueError, "a Unix socket's path has at most 107 bytes"),
        ("/run/app\0.sock", ValueError, "a NUL can only be its first character"),
        ("\0abstract\0", ValueError, "a NUL can only be its first character"),
        (("example.org",), TypeError, r"\('example.org',\): pass \(host, port\), or a Unix"),
        (("example.org", 80, 0, 0), TypeError, r"pass \(host, port\), or a Unix socket's path"),
        (["example.org", 80], TypeError, r"\['example.org', 80\]: pass \(host, port\)"),
        (80, TypeError, r"endpoint 80: pass \(host, port\)"),
        (None, TypeError, r"endpoint None: pass \(host, port\)"),
        (b"/run/app.sock", TypeError, r"pass \(host, port\), or a Unix socket's path"),
        (("example.org", "80"), TypeError, "pass the host as text, the port as a number"),
        (("example.org", 80.0), TypeError, "pass the host as text, the port as a number"),
        (("example.org", True), TypeError, "pass the host as text, the port as a number"),
        (("example.org", None), TypeError, "pass the host as text, the port as a number"),
        ((None, 80), TypeError, "pass the host as text, the port as a number"),
        ((b"example.org", 80), TypeError, "pass the host as text, the port as a number"),
        (("", 80), ValueError, "pass a host name or an IP address"),
        (("example.org\0", 80), ValueError, "pass a host name or an IP address"),
        (("example.org", 0), ValueError, "pass a port from 1 to 65535"),
        (("example.org", 65536), ValueError, "pass a port from 1 to 65535"),
        (("example.org", -1), ValueError, "pass a port from 1 to 65535"),
    ],
)
def test_what_cannot(given: Any, error: type[Exception], says: str) -> None:
    """What nobody can connect to is named, with what to pass instead."""
    with pytest.raises(error, match=says):
        check_endpoint(given)
    with pytest.raises(error, match=says):
        Rounds([A, given], "in_order")


@given(name=st.text("x\N{SNOWMAN}", min_size=30, max_size=120))
def test_every_path_that_is_taken_fits(name: str) -> None:
    """A path is refused exactly if it, with its final zero, is too long for the kernel."""
    path = "/" + name
    if len(os.fsencode(path)) < 108:
        assert check_endpoint(path) == path
    else:
        with pytest.raises(ValueError, match="at most 107 bytes"):
            check_endpoint(path)


# -- rounds


@pytest.mark.parametrize("endpoints", [[], (), {}, iter([])])
def test_no_endpoints(endpoints: Any) -> None:
    """At least one is needed, and the text says so."""
    with pytest.raises(ValueError, match=r"pass at least one \(host, port\) or Unix path"):
        Rounds(endpoints, "in_order")


@pytest.mark.parametrize("chooser", ["first", "", None, 1])
def test_wrong_choosers(chooser: Any) -> None:
    """What is no chooser fails at construction."""
    with pytest.raises(ValueError, match='pass "in_order", "random" or a function'):
        Rounds(ALL, chooser)


def test_in_order() -> None:
    """Each round goes through them as they were given."""
    rounds = Rounds(ALL, "in_order")
    for _ in range(3):
        assert a_round(rounds) == ALL


def test_any_iterable_of_endpoints() -> None:
    """They are looked at once, at construction."""
    given = [A, B]
    rounds = Rounds(iter(given), "in_order")
    given.clear()
    assert a_round(rounds) == [A, B]
    assert a_round(rounds) == [A, B]


@pytest.mark.parametrize("given", ["/run/app.sock", "example.org:80", b"/run/app.sock"])
def test_one_endpoint_is_no_list(given: Any) -> None:
    """Text where a list belongs is named as that, and not taken character by character."""
    with pytest.raises(TypeError, match=r"pass a list of \(host, port\) and Unix paths"):
        places(None, None, None, given)


def test_duplicates() -> None:
    """One that is named twice is tried once a round."""
    rounds = Rounds([A, C, A, C, B, ("b.example", 2)], "in_order")
    assert a_round(rounds) == [A, C, B]


def test_path_objects() -> None:
    """Where endpoints are given to the library, a path object is as good as its text."""
    given = [A, Path(C), C, Path("c.sock")]
    assert a_round(Rounds(places(None, None, None, given), "in_order")) == [A, C, "./c.sock"]
    with pytest.raises(ValueError, match=r"'c.sock': pass .* a Unix socket's path with a slash"):
        Rounds(places(None, None, None, ["c.sock"]), "in_order")


def test_random() -> None:
    """Each round has its own order, and every order comes."""
    random.seed(3)
    rounds = Rounds(ALL, "random")
    orders = {tuple(a_round(rounds)) for _ in range(200)}
    assert len(orders) == 6
    assert all(set(order) == set(ALL) for order in orders)


def test_a_chooser_of_ones_own() -> None:
    """It gets those that the round has not tried, in the order given, and its answer is taken."""
    seen = []

    def choose(endpoints: Sequence[Endpoint]) -> Endpoint:
        seen.append(list(endpoints))
        return endpoints[len(endpoints) // 2]

    rounds = Rounds(ALL, choose)
    assert a_round(rounds) == [B, C, A]
    assert seen == [[A, B, C], [A, C], [A]]


def test_a_chooser_cannot_change_the_round() -> None:
    """What it gets is its own, so what it does to that changes nothing."""

    def choose(endpoints: Sequence[Endpoint]) -> Endpoint:
        with pytest.raises((TypeError, AttributeError)):
            endpoints.clear()  # type: ignore[attr-defined]
        return endpoints[0]

    assert a_round(Rounds(ALL, choose)) == ALL


@pytest.mark.parametrize("answer", [("z.example", 1), None, "a.example"])
def test_a_chooser_that_gives_another(answer: Any) -> None:
    """An answer that is none of those it got raises and names both; nothing has been tried."""
    answers = [answer, A]
    rounds = Rounds([A, B], lambda endpoints: answers.pop(0))
    with pytest.raises(ValueError, match=r"the chooser gave .*, which is none of \[\('a.example"):
        rounds.next()
    assert rounds.next() == A
    # Tried in this round already, so it cannot be chosen again.
    answers.append(A)
    with pytest.raises(ValueError, match=r"the chooser gave .*, which is none of \[\('b.example"):
        rounds.next()


def test_given_up() -> None:
    """One that was given up is left out of later rounds, until `restart`."""
    rounds = Rounds(ALL, "in_order")
    assert rounds.next() == A
    rounds.give_up(A)
    assert not rounds.complete
    assert [rounds.next(), rounds.next()] == [B, C]
    assert a_round(rounds) == [B, C]
    assert not rounds.exhausted
    rounds.restart()
    assert a_round(rounds) == ALL


def test_all_given_up() -> None:
    """When the last one has been given up there is nothing left, until `restart`."""
    rounds = Rounds([A, B], "in_order")
    for endpoint in (A, B):
        assert not rounds.exhausted
        assert rounds.next() == endpoint
        rounds.give_up(endpoint)
    assert rounds.exhausted
    assert rounds.complete
    rounds.restart()
    assert not rounds.exhausted


def test_restart_within_a_round() -> None:
    """A restart begins with the first, wherever the round was."""
    rounds = Rounds(ALL, "in_order")
    rounds.next()
    rounds.restart()
    assert rounds.complete
    assert a_round(rounds) == ALL


class RoundsMachine(RuleBasedStateMachine):
    """Any sequence of steps against a plain model: a set of those alive, a set of those left."""

    @initialize(
        number=st.integers(1, 5),
        chooser=st.sampled_from(["in_order", "random", last]),
        repeats=st.integers(1, 2),
    )
    def begin(self, number: int, chooser: Chooser, repeats: int) -> None:
        self.all: list[Endpoint] = [(f"{n}.example", n) for n in range(1, number + 1)]
        self.chooser = chooser
        self.rounds = Rounds(self.all * repeats, chooser)
        self.alive = list(self.all)
        self.left: list[Endpoint] = []
        self.tried: Endpoint | None = None

    @precondition(lambda self: self.alive)
    @rule()
    def next(self) -> None:
        self.left = self.left or list(self.alive)
        self.tried = self.rounds.next()
        # Alive, and not tried in this round.
        assert self.tried in self.left
        if self.chooser != "random":
            assert self.tried == self.left[0 if self.chooser == "in_order" else -1]
        self.left.remove(self.tried)

    @precondition(lambda self: self.tried is not None)
    @rule()
    def give_up(self) -> None:
        assert self.tried is not None
        self.rounds.give_up(self.tried)
        self.alive.remove(self.tried)
        self.tried = None

    @rule()
    def restart(self) -> None:
        self.rounds.restart()
        self.alive = list(self.all)
        self.left = []
        self.tried = None

    @invariant()
    def it_knows_where_it_is(self) -> None:
        assert self.rounds.complete == (not self.left)
        assert self.rounds.exhausted == (not self.alive)


TestRounds = RoundsMachine.TestCase
TestRounds.settings = settings(max_examples=50, stateful_step_count=30)


# -- what an attempt says


def attempt(endpoint: Endpoint, error: Exception | None) -> ConnectAttempt:
    """One that took an eighth of a second."""
    return ConnectAttempt(
        number=1, endpoint=endpoint, address=None, duration=0.125, error=error, delay=None
    )


def refused(text: str = "Connection refused") -> OSError:
    """What the kernel says where nobody listens."""
    return OSError(errno.ECONNREFUSED, text)


@pytest.mark.parametrize(
    ("endpoint", "error", "text"),
    [
        (A, None, "a.example:1: connected in 0.125 s"),
        (("::1", 7), None, "[::1]:7: connected in 0.125 s"),
        (C, None, "/run/c.sock: connected in 0.125 s"),
        ("\0name", None, "@name: connected in 0.125 s"),
        (A, refused(), "a.example:1: Connection refused"),
        (A, refused("192.0.2.1:1: refused"), "a.example:1: 192.0.2.1:1: refused"),
        # The error of an address that is the endpoint itself names it already.
        (("192.0.2.1", 1), refused("192.0.2.1:1: refused"), "192.0.2.1:1: refused"),
        (A, socket.gaierror(socket.EAI_NONAME, "unknown"), "a.example:1: unknown"),
        (A, OSError("only text"), "a.example:1: only text"),
        (A, OSError(), "a.example:1: OSError()"),
        (A, UnicodeError("label too long"), "a.example:1: label too long"),
        (
            A,
            ExceptionGroup("", [refused("x: refused"), OSError(errno.ETIMEDOUT, "y: timed out")]),
            "a.example:1: x: refused; y: timed out",
        ),
        (
            A,
            ExceptionGroup("", [ExceptionGroup("", [refused("x")]), OSError("y"), OSError("z")]),
            "a.example:1: x; y; z",
        ),
    ],
)
def test_an_attempt_in_a_line(endpoint: Endpoint, error: Exception | None, text: str) -> None:
    """The text says where and how it ended: of a group every error, and nothing twice."""
    assert str(attempt(endpoint, error)) == text


def test_an_attempt_cannot_be_changed() -> None:
    """It is a report, so it stays as it is."""
    report = attempt(A, None)
    with pytest.raises(FrozenInstanceError):
        report.number = 2  # type: ignore[misc]
