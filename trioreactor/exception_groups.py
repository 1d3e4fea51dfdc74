"""Exception groups: trio's nurseries make them, also where there is one error only."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast


@contextmanager
def unwrapped() -> Generator[None]:
    """Around a nursery: an error that is alone leaves without its group."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = lone(group)
        context = error.__context__
        try:
            raise error
        finally:
            # What it was raised beside stays as it was: the group says nothing more.
            error.__context__ = context


def members(error: BaseException) -> tuple[BaseException, ...]:
    """What is in *error*, if it is a group; else nothing."""
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).exceptions
    return ()


def lone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The only exception in *group*, or *group*: a single error needs no wrapping."""
    if len(group.exceptions) != 1:
        return group
    inner = group.exceptions[0]
    return lone(inner) if isinstance(inner, BaseExceptionGroup) else inner
