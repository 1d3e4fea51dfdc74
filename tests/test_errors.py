"""The library's own errors: few, under one base, and beneath trio's words where trio has one."""

from __future__ import annotations

import builtins

import pytest
import trio

import trioreactor
from trioreactor import (
    IllegalStateTransition,
    ProtocolError,
    ReceiveBufferFull,
    SendBufferFull,
    TrioReactorError,
    errors,
)

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


@pytest.mark.parametrize("error", own_errors)
def test_text_is_kept(error: type[Exception]) -> None:
    """The text that an error is raised with is the text that is read."""
    assert str(error("pass something else")) == "pass something else"
