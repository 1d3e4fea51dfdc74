"""Exception groups: an error that is alone needs none, several stay together."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import trio

from trioreactor.exception_groups import lone, members, unwrapped, without_frames

pytestmark = pytest.mark.pure


def test_members() -> None:
    """A group has members, in their order; what is no group has none, not even an empty row."""
    one, two = ValueError("1"), KeyError("2")
    assert members(ExceptionGroup("", [one, two])) == (one, two)
    assert members(BaseExceptionGroup("", [KeyboardInterrupt(), one]))
    assert members(one) is None
    assert members(KeyboardInterrupt()) is None


def test_lone() -> None:
    """What is alone is found however deep it is; a group of several is given back as it is."""
    error = ValueError("alone")
    assert lone(ExceptionGroup("", [error])) is error
    deep = ExceptionGroup("", [ExceptionGroup("", [ExceptionGroup("", [error])])])
    assert lone(deep) is error
    several = ExceptionGroup("", [error, KeyError()])
    assert lone(several) is several
    assert lone(ExceptionGroup("", [several])) is several
    # Each half holds one, together they are two.
    halves = ExceptionGroup("", [ExceptionGroup("", [error]), KeyError()])
    assert lone(halves) is halves


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_a_single_error_leaves_alone(error: BaseException) -> None:
    """A single error, of whatever kind, leaves as itself."""
    with pytest.raises(type(error)) as raised, unwrapped():
        raise BaseExceptionGroup("the nursery's", [error])
    assert raised.value is error


def test_a_group_of_the_users_own_stays() -> None:
    """Only the nursery's own group is taken off: one that was raised inside leaves as it was."""
    for inner in (ExceptionGroup("mine", [ValueError()]), ExceptionGroup("", [ValueError()] * 2)):
        with pytest.raises(ExceptionGroup) as raised, unwrapped():
            raise ExceptionGroup("the nursery's", [inner])
        assert raised.value is inner


def test_several_errors_stay_together() -> None:
    """Several leave in the very group they were in."""
    group = ExceptionGroup("both", [ValueError(), KeyError()])
    with pytest.raises(ExceptionGroup) as raised, unwrapped():
        raise group
    assert raised.value is group
    assert group.__context__ is None


def test_what_is_no_group_passes() -> None:
    """No error, no change; an error that comes without a group is left alone."""
    with unwrapped():
        pass
    error = ValueError("plain")
    with pytest.raises(ValueError, match="plain") as raised, unwrapped():
        raise error
    assert raised.value is error


def test_the_error_says_no_more_than_it_did() -> None:
    """What an error was raised beside stays, and its group does not take that place: no "During
    handling of the above exception" that says nothing.
    """
    for before in (None, KeyError("the error before")):
        error: Any = ValueError("alone")
        error.__context__ = before
        with pytest.raises(ValueError, match="alone") as raised, unwrapped():
            raise ExceptionGroup("wrapping", [error])
        assert raised.value.__context__ is before
        text = "".join(traceback.format_exception(raised.value))
        assert "wrapping" not in text
        assert ("the error before" in text) == (before is not None)


def test_the_cause_is_kept() -> None:
    """An error's own cause stays with it."""
    cause = OSError("why")
    error = ValueError("alone")
    error.__cause__ = cause
    with pytest.raises(ValueError, match="alone") as raised, unwrapped():
        raise ExceptionGroup("", [error])
    assert raised.value.__cause__ is cause


async def test_around_a_nursery() -> None:
    """What a nursery's only failing task raised leaves as if it had been called."""

    async def fail(error: Exception) -> None:
        # With no checkpoint, where the other one's failure would cancel it.
        raise error

    with pytest.raises(ValueError, match="the only one") as raised, unwrapped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, ValueError("the only one"))
            await trio.sleep_forever()
    # Where it came from can still be read.
    assert any(entry.name == "fail" for entry in raised.traceback)

    with pytest.raises(ExceptionGroup) as several, unwrapped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, ValueError())
            nursery.start_soon(fail, KeyError())
    assert {type(error) for error in several.value.exceptions} == {ValueError, KeyError}


async def test_a_cancellation_passes() -> None:
    """A cancelled block ends in its own scope, with no group and no error."""
    with trio.CancelScope() as scope, unwrapped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


def test_without_frames() -> None:
    """An error to be remembered holds on to no frame, nor do its group's members and the causes of
    each, which stay.
    """

    def raised(error: Exception) -> Exception:
        try:
            try:
                raise OSError("why")
            except OSError as why:
                raise error from why
        except Exception as caught:
            return caught

    one, two = raised(ValueError("1")), raised(ValueError("2"))
    group = raised(ExceptionGroup("", [ExceptionGroup("", [one]), two]))
    for error in (one, two, group):
        assert error.__traceback__ is not None
        assert error.__cause__ is error.__context__ is not None
        assert error.__cause__.__traceback__ is not None
    assert without_frames(group) is group
    for error in (one, two, group):
        assert error.__traceback__ is error.__context__ is None
        assert isinstance(error.__cause__, OSError)
        assert error.__cause__.__traceback__ is None
