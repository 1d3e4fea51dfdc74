"""WorkerOptions: refused at once where they cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest

from trioreactor import Backoff, WorkerOptions

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"grace": -1}, r"WorkerOptions\(grace=-1\): pass at least 0 seconds"),
        ({"grace": None}, "this one cannot be turned off|pass a number of seconds"),
        ({"hang_timeout": 0}, "pass more than 0 seconds, or None for off"),
        ({"start_timeout": "soon"}, "pass a number of seconds"),
        ({"backoff": 3}, r"pass a Backoff\(...\)"),
        ({"reuse_port": 1}, "pass a bool"),
    ],
)
def test_refused(options: dict[str, Any], complaint: str) -> None:
    """With what to pass instead."""
    with pytest.raises((TypeError, ValueError), match=complaint):
        WorkerOptions(**options)


def test_may_be_off() -> None:
    """Hangs need not be looked for, and a drain may take no time."""
    options = WorkerOptions(hang_timeout=None, grace=0)
    assert options.backoff == Backoff(initial=0.1, maximum=5.0)
