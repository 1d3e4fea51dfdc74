"""Errors and their groups: trio's nurseries make groups, also where there is one error only."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar, cast

E = TypeVar("E", bound=BaseException)


@contextmanager
def unwrapped() -> Generator[None]:
    """Around a nursery: an error that is alone leaves without its group."""
    try:
        yield
    except BaseExceptionGroup as group:
        # Not `lone`: a group within is one that the user made.
        error = group.exceptions[0] if len(group.exceptions) == 1 else group
        context = error.__context__
        try:
            raise error
        finally:
            # What it was raised beside stays as it was: the group says nothing more.
            error.__context__ = context


def members(error: BaseException) -> tuple[BaseException, ...] | None:
    """What is in *error*, if it is a group; else None."""
    # A bare isinstance would leave type checkers in the dark about what kind of group it is.
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).exceptions
    return None


def leaves(error: BaseException) -> list[BaseException]:
    """*error*, or what is in it and in its groups."""
    inner = members(error)
    return [error] if inner is None else [leaf for one in inner for leaf in leaves(one)]


def without_frames(error: E) -> E:
    """*error*, cut off from where and while doing what it was raised.

    For errors that are remembered: a traceback holds on to frames, and those to all that they use.
    """
    error.__traceback__ = error.__context__ = None
    for inner in (*(members(error) or ()), error.__cause__):
        if inner is not None:
            without_frames(inner)
    return error


def twin(error: E) -> E:
    """Another *error* like it, that has not been raised."""
    # The constructor may take other arguments than those it gave on.
    other = type(error).__new__(type(error), *error.args)
    other.__dict__.update(error.__dict__)
    return other


def lone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The only exception in *group*, or *group*: a single error needs no wrapping."""
    error: BaseException = group
    while (inner := members(error)) is not None and len(inner) == 1:
        error = inner[0]
    return error
