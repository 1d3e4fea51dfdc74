"""The library's own errors: few, under one base, and beneath trio's words where trio has one."""

from __future__ import annotations

import builtins
import copy
import errno
import pickle

import pytest
import trio

import trioreactor
from trioreactor import (
    ConnectAttempt,
    ConnectError,
    IllegalStateTransition,
    NotConnected,
    ProtocolError,
    ReceiveBufferFull,
    SendBufferFull,
    TrioReactorError,
    errors,
)

pytestmark = pytest.mark.pure

own_errors = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and value.__module__ == errors.__name__
]


@pytest.mark.parametrize("error", own_errors)
def test_all_are_under_one_base(error: type) -> None:
    """Whoever catches TrioReactorError catches every error of the library."""
    assert issubclass(error, TrioReactorError)
    assert issubclass(error, Exception)


@pytest.mark.parametrize("error", own_errors)
def test_all_are_public(error: type) -> None:
    """What can be raised at a user can be named by the user."""
    assert getattr(trioreactor, error.__name__) is error
    assert error.__name__ in trioreactor.__all__


@pytest.mark.parametrize("error", own_errors)
def test_no_name_is_taken(error: type) -> None:
    """No error hides one of Python's or trio's."""
    assert not hasattr(builtins, error.__name__)
    assert not hasattr(trio, error.__name__)


def test_a_full_send_buffer_is_a_broken_connection() -> None:
    """A sender that handles a broken connection in trio's way handles SendBufferFull, too."""
    with pytest.raises(trio.BrokenResourceError):
        raise SendBufferFull("the text")
    assert not issubclass(SendBufferFull, ProtocolError)


def test_protocol_errors() -> None:
    """What a peer can provoke is a ProtocolError, and never looks as if the network broke."""
    assert issubclass(ReceiveBufferFull, ProtocolError)
    for error in (ProtocolError, ReceiveBufferFull):
        assert not issubclass(error, (trio.BrokenResourceError, trio.ClosedResourceError, OSError))


def test_an_illegal_move_is_a_programming_error() -> None:
    """IllegalStateTransition is a RuntimeError, and no protocol error that a server forgives."""
    assert issubclass(IllegalStateTransition, RuntimeError)
    assert not issubclass(IllegalStateTransition, ProtocolError)


@pytest.mark.parametrize("error", [e for e in own_errors if "__init__" not in vars(e)])
def test_text_is_kept(error: type[Exception]) -> None:
    """The text that an error is raised with is the text that is read."""
    assert str(error("pass something else")) == "pass something else"


def test_a_full_receive_buffer_says_what_to_do() -> None:
    """It names both numbers, and the two ways out."""
    text = str(ReceiveBufferFull(1234, 1000))
    assert "1234 bytes unconsumed" in text
    assert "receive_limit is 1000" in text
    assert "Watermarks(receive_limit=...)" in text
    assert "stop_reading()" in text


def test_errors_can_be_copied() -> None:
    """A copy, or what another process makes of it, says the same."""
    attempts = [failed(1, OSError(errno.ECONNREFUSED, "refused"))]
    for error in (
        ReceiveBufferFull(1234, 1000),
        ConnectError("no connection", attempts),
        ConnectError("no connection", []),
        *(kind("text") for kind in own_errors if "__init__" not in vars(kind)),
    ):
        for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            assert type(twin) is type(error)
            assert str(twin) == str(error)
            if isinstance(error, ConnectError):
                assert twin.errno == error.errno
                assert list(map(str, twin.attempts)) == list(map(str, error.attempts))
                assert repr(twin.__cause__) == repr(error.__cause__)


# -- no connection


def failed(number: int, error: Exception) -> ConnectAttempt:
    """An attempt that met *error*."""
    return ConnectAttempt(
        number=number,
        endpoint=("a.example", 7),
        address=None,
        duration=0.1,
        error=error,
        delay=None,
    )


def test_no_connection_is_an_os_error() -> None:
    """Whoever catches what a plain connect raises catches ConnectError."""
    with pytest.raises(OSError, match=r"^no connection$"):
        raise ConnectError("no connection", [])
    for word in (trio.BrokenResourceError, trio.ClosedResourceError):
        assert not issubclass(ConnectError, word)


def test_every_attempt_is_told() -> None:
    """It holds the attempts, oldest first, as they were then; the last error is the cause, and
    its number the number.
    """
    given = [
        failed(1, OSError(errno.ENETUNREACH, "unreachable")),
        failed(2, OSError(errno.ECONNREFUSED, "refused")),
    ]
    error = ConnectError(f"no connection: {given[-1]}", given)
    given.clear()
    assert [attempt.number for attempt in error.attempts] == [1, 2]
    assert error.__cause__ is error.attempts[1].error
    assert error.errno == errno.ECONNREFUSED
    assert str(error) == "no connection: a.example:7: refused"


@pytest.mark.parametrize(
    "cause",
    [None, UnicodeError("no such name"), ExceptionGroup("", [OSError(errno.ETIMEDOUT, "late")])],
)
def test_no_number(cause: Exception | None) -> None:
    """Where the last error has no number, or there is none, ConnectError has none; no attempt at
    all is no error of its own.
    """
    error = ConnectError("no connection", [failed(1, cause)] if cause else [])
    assert error.errno is None
    assert error.__cause__ is cause
    assert len(error.attempts) == (cause is not None)
    assert str(error) == "no connection"


def test_not_connected_is_a_broken_connection() -> None:
    """Code that takes a lost connection in its stride takes the time between two as well; that
    the client is closed is something else.
    """
    assert issubclass(NotConnected, trio.BrokenResourceError)
    assert not issubclass(NotConnected, (trio.ClosedResourceError, OSError, ProtocolError))
