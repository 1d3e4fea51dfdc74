"""What happens to a broadcast's message that a slow peer has no room for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import trio

from trioreactor.send_buffer import Crossing, Droppable

if TYPE_CHECKING:
    from trioreactor.write_half import WriteHalf

Overflow: TypeAlias = Literal["close", "drop_newest", "drop_oldest"]
"""At the hard limit: close the connection; leave the new message out; or drop the oldest ones that
were offered before and of which nothing is written yet. Only whole messages are ever dropped."""


def check_overflow(owner: str, overflow: object) -> None:
    """Raise unless *overflow* is one of the three."""
    if overflow not in ("close", "drop_newest", "drop_oldest"):
        raise ValueError(
            f'{owner}(overflow={overflow!r}): pass "close", "drop_newest" or "drop_oldest"'
        )


@trio.lowlevel.enable_ki_protection
def offer(write: WriteHalf, data: Droppable, overflow: Overflow) -> int:
    """Send *data*, or drop as *overflow* says; how many messages were dropped since the last time,
    for this one or for others that had to be sent.
    """
    # Whatever stands in the way of sending raises here: the half is closed, or a `send_all` that
    # streams slices would be torn.
    write.send(b"")
    if overflow == "close" or not data:
        write.send(data)
    else:
        _offer(write, data, overflow)
    buffer = write.buffer
    untold = buffer.dropped - buffer.told
    buffer.told = buffer.dropped
    return untold


def _offer(write: WriteHalf, data: Droppable, overflow: Overflow) -> None:
    buffer = write.buffer
    if not buffer.can_ever_hold(len(data)):
        # The kernel may take a part, and the rest would have no place.
        buffer.refuse()
        return
    if write.corked and write.queued:
        _make_way(write, len(data))
    if not buffer.size:
        write.send(data)
        return
    if overflow == "drop_oldest" and buffer.drop_oldest(len(data)) is Crossing.LOW:
        write.sank()
    if buffer.has_room(len(data)):
        write.enqueue(data)
    else:
        buffer.refuse()


def _make_way(write: WriteHalf, n: int) -> None:
    """What is gathered goes before *n* bytes more, to the kernel if it would have no room here."""
    buffer = write.buffer
    if write.held is not None:
        # No crossing: it is no more than the high mark, and nothing else is queued.
        buffer.append(write.held)
        write.held = None
    if buffer.size + n > buffer.high or not buffer.has_room(n):
        # If it finds the connection broken, that empties the queue, and the next send raises.
        write.flush()
