"""What every command shares."""

from __future__ import annotations

import argparse

import pytest

from trioreactor.command_line import count, seconds

pytestmark = pytest.mark.pure


def test_count() -> None:
    """One connection, two connections."""
    assert [count(number, "connection") for number in (0, 1, 2)] == [
        "0 connections",
        "1 connection",
        "2 connections",
    ]


@pytest.mark.parametrize("text", ["soon", "", "-1", "inf", "nan"])
def test_no_time(text: str) -> None:
    """Is refused with what to pass."""
    with pytest.raises(argparse.ArgumentTypeError, match="pass a number of seconds"):
        seconds(text)


def test_seconds() -> None:
    """None is one, too."""
    assert [seconds(text) for text in ("0", "1.5", "3")] == [0, 1.5, 3]
