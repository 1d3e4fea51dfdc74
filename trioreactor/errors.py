"""The few errors that trio has no word for.

For everything else trio's three words are used: `trio.ClosedResourceError` (we closed it),
`trio.BrokenResourceError` (the peer or the network did) and `trio.BusyResourceError` (two tasks
on one end).
"""

from __future__ import annotations

import trio


class TrioReactorError(Exception):
    """The base of every error that is trioreactor's own."""


class IllegalStateTransition(TrioReactorError, RuntimeError):
    """A connection was asked to make a move that the transition table does not have.

    Nothing has changed when this is raised. It is a bug in whoever asked.
    """


class SendBufferFull(TrioReactorError, trio.BrokenResourceError):
    """`send` would have taken the send buffer over `Watermarks.limit`.

    The peer reads too slowly and the sender did not wait. The data was not queued, and the
    connection has been closed with `CloseReason.SLOW_CONSUMER`.
    """


class ProtocolError(TrioReactorError):
    """The peer sent what the protocol does not allow. Its connection ends, nothing else does."""


class ReceiveBufferFull(ProtocolError):
    """`on_message` left `Watermarks.receive_limit` bytes unconsumed, so no more can be read.

    Raised out of `TcpConnection.dispatch`. A callback that wants to wait on purpose calls
    `stop_reading()`, and then this is not raised.
    """
