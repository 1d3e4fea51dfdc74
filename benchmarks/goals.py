"""What the library wants to reach, and whether a run of the suite did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from works import DISPATCH, SEND, SEND_ALL

TRIO = "plain trio"
PROTOCOL = "asyncio Protocol"
STREAMS = "asyncio streams"
UV_PROTOCOL = "uvloop Protocol"
UV_STREAMS = "uvloop streams"
# The loops that it is tried on; uvloop is not one of them.
EASY = ("EasyNetwork on trio", "EasyNetwork on asyncio")


@dataclass(frozen=True)
class Goal:
    """*ours* is to be at most (or at least) *factor* times the best of *peers*."""

    work: str
    ours: str
    factor: float
    peers: tuple[str, ...]
    key: str | None = None
    """What is compared; the work's own metric if None."""
    at_least: bool = False

    def text(self) -> str:
        """In one line."""
        sign = ">=" if self.at_least else "<="
        best = self.peers[0] if len(self.peers) == 1 else f"the best of {', '.join(self.peers)}"
        key = f" {self.key}" if self.key else ""
        return f"{self.work}{key}: {self.ours} {sign} {self.factor} x {best}"

    def figures(self, work: Mapping[str, Any]) -> dict[str, float]:
        """Of each server that is compared, where there is more than nothing."""
        found = ((name, _figure(work, name, self.key)) for name in (self.ours, *self.peers))
        return {name: value for name, value in found if value is not None}


def _figure(work: Mapping[str, Any], server: str, key: str | None) -> float | None:
    value = work["servers"].get(server, {}).get(key or work["metric"])
    return value if value is not None and value > 0 else None


def _goals() -> Iterable[Goal]:
    for work in ("echo-50", "echo-500"):
        yield Goal(work, DISPATCH, 1.0, (UV_PROTOCOL,))
        yield Goal(work, DISPATCH, 0.75, (PROTOCOL,))
        yield Goal(work, DISPATCH, 0.35, (TRIO,))
        yield Goal(work, SEND, 1.0, (UV_STREAMS,))
        yield Goal(work, SEND, 0.5, (TRIO,))
        yield Goal(work, SEND_ALL, 1.0, (STREAMS,))
        yield Goal(work, SEND_ALL, 0.5, (TRIO,))
    for ours, factor in ((DISPATCH, 1.05), (SEND, 1.1), (SEND_ALL, 1.1)):
        yield Goal("echo-1", ours, factor, (TRIO, UV_PROTOCOL, UV_STREAMS), "p50")
    yield Goal("echo-16k", DISPATCH, 1.0, (UV_PROTOCOL,))
    yield Goal("echo-16k", SEND, 1.0, (UV_STREAMS,))
    yield Goal("echo-16k", SEND_ALL, 1.0, (STREAMS,))
    yield Goal("lines", DISPATCH, 0.9, (UV_PROTOCOL,))
    yield Goal("lines", SEND, 1.0, (UV_STREAMS,))
    for work in ("tls-50", "tls-16k"):
        yield Goal(work, DISPATCH, 1.0, (UV_PROTOCOL,))
        yield Goal(work, SEND, 0.6, (TRIO,))
        yield Goal(work, SEND_ALL, 0.6, (TRIO,))
    for work in ("sink", "source"):
        yield Goal(work, DISPATCH, 1.0, (UV_PROTOCOL, UV_STREAMS), at_least=True)
        yield Goal(work, SEND, 1.0, (STREAMS,), at_least=True)
    yield Goal("connect", DISPATCH, 1.0, (PROTOCOL,))
    yield Goal("connect", SEND, 1.0, (STREAMS,))
    yield Goal("connect", SEND, 0.7, (TRIO,))
    yield Goal("broadcast", DISPATCH, 1.0, (UV_PROTOCOL,))
    yield Goal("broadcast", SEND, 1.0, (UV_PROTOCOL,))
    yield Goal("memory", DISPATCH, 1.0, (PROTOCOL,))
    yield Goal("memory", SEND, 1.0, (STREAMS,))
    yield Goal("framed", DISPATCH, 0.5, EASY)
    yield Goal("framed", SEND, 0.7, EASY)


GOALS = tuple(_goals())

# CPU a request with 100 active of so many connections, over that with no others.
GROWTH = (("active-1000", "active-100"), ("active-5000", "active-100"))
GROWTH_FACTOR = 1.1


def judged(works: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal that *works* can tell of: its text, the ratio found, and whether it is reached."""
    found: list[dict[str, Any]] = []
    for goal in GOALS:
        figures = goal.figures(works[goal.work]) if goal.work in works else {}
        if len(figures) <= len(goal.peers):
            continue
        ours = figures.pop(goal.ours)
        best = max(figures.values()) if goal.at_least else min(figures.values())
        ratio = ours / best
        reached = ratio >= goal.factor if goal.at_least else ratio <= goal.factor
        found.append({"goal": goal.text(), "ratio": ratio, "reached": reached})
    for many, few in GROWTH:
        for ours in (DISPATCH, SEND, SEND_ALL) if many in works and few in works else ():
            cpu, alone = (_figure(works[name], ours, "cpu_us") for name in (many, few))
            if cpu is not None and alone is not None:
                ratio = cpu / alone
                text = f"{many}: {ours} <= {GROWTH_FACTOR} x its own {few}"
                reached = ratio <= GROWTH_FACTOR
                found.append({"goal": text, "ratio": ratio, "reached": reached})
    return found


def not_judged(works: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goals whose work was measured, but not with all servers that they name: their text, and
    those that are missing.
    """
    found: list[dict[str, Any]] = []
    for goal in GOALS:
        if goal.work in works:
            figures = goal.figures(works[goal.work])
            missing = [name for name in (goal.ours, *goal.peers) if name not in figures]
            if missing:
                found.append({"goal": goal.text(), "missing": missing})
    return found


def lines(
    found: Sequence[Mapping[str, Any]], not_judged: Sequence[Mapping[str, Any]]
) -> Iterable[str]:
    """The goals as text."""
    if found:
        yield ""
        yield "goals"
    for goal in found:
        yield f"{'   ' if goal['reached'] else '!! '}{goal['ratio']:>6.2f}  {goal['goal']}"
    if not_judged:
        missing = dict.fromkeys(name for goal in not_judged for name in goal["missing"])
        yield ""
        yield f"not judged: {len(not_judged)} goals, for want of {', '.join(missing)}"
