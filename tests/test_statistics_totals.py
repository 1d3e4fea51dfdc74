"""Sums of server statistics, over processes."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from types import MappingProxyType

import pytest

from trioreactor import CloseReason, ServerStatistics
from trioreactor.statistics_totals import NOTHING, after_death, as_plain, from_plain, total

pytestmark = pytest.mark.pure

ONE = replace(
    NOTHING,
    **{
        field.name: number
        for number, field in enumerate(fields(ServerStatistics), 1)
        if field.name not in ("closed", "rejected")
    },
    closed=MappingProxyType({CloseReason.PEER_EOF: 3, CloseReason.FORCED: 1}),
    rejected=MappingProxyType({"connections": 2}),
)


def test_total() -> None:
    """Each counter is added up, and each reason and limit for itself."""
    other = replace(
        ONE,
        closed=MappingProxyType({CloseReason.PEER_EOF: 1, CloseReason.IDLE_TIMEOUT: 5}),
        rejected=MappingProxyType({}),
    )
    both = total([ONE, other])
    for field in fields(ServerStatistics):
        if field.name not in ("closed", "rejected", "loop_lag"):
            assert getattr(both, field.name) == 2 * getattr(ONE, field.name) > 0
    assert both.closed == {
        CloseReason.PEER_EOF: 4,
        CloseReason.FORCED: 1,
        CloseReason.IDLE_TIMEOUT: 5,
    }
    assert both.rejected == {"connections": 2}
    assert total([]) == NOTHING
    assert total([ONE, replace(ONE, loop_lag=0.5), NOTHING]).loop_lag == ONE.loop_lag


def test_by_way_of_text() -> None:
    """What another process says comes out as it went in."""
    assert from_plain(json.loads(json.dumps(as_plain(ONE)))) == ONE


def test_after_death() -> None:
    """What was open is closed, so that the sum holds."""
    last = replace(ONE, opened=10, active=6)
    dead = after_death(last)
    assert (dead.active, dead.buffered) == (0, 0)
    assert dead.opened == sum(dead.closed.values()) == 10
    assert after_death(NOTHING) == NOTHING
