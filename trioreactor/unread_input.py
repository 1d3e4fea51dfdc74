"""UnreadInput: what a connection has for whoever reads, and its end, seen without reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trioreactor.buffer import Buffer
from trioreactor.sockets import peek, pending_error

if TYPE_CHECKING:
    import trio

    from trioreactor.channel import Channel
    from trioreactor.connection_callbacks import OnMessage
    from trioreactor.half_owner import HalfOwner
    from trioreactor.sockets import DataSocket


class UnreadInput:
    """Who reads, what there is for them, and whether more can come."""

    __slots__ = (
        "_on_message",
        "_owner",
        "_sock",
        "_task",
        "_watching",
        "buffer",
        "channel",
        "eof",
        "reading",
        "reset_error",
    )

    channel: Channel

    def __init__(self, owner: HalfOwner, sock: DataSocket) -> None:
        # Replaced by `GONE` at the close.
        self._owner: HalfOwner = owner
        self._sock = sock
        # What was read and not consumed: only a dispatch callback leaves anything here.
        self.buffer = Buffer()
        # False between `stop_reading` and `start_reading`.
        self.reading = True
        # The task in receive_some or dispatch. A dispatch may have none.
        self._task: trio.lowlevel.Task | None = None
        # Set while dispatching.
        self._on_message: OnMessage | None = None
        # The peer's EOF has been read.
        self.eof = False
        # A send met a reset and took the kernel's note of it: the EOF to be read next is none.
        self.reset_error: OSError | None = None
        # Somebody wants to hear of the EOF without reading.
        self._watching = False

    def use(self, sock: DataSocket) -> None:
        """Read from *sock* from now on: TLS begins."""
        self._sock = sock

    @property
    def busy(self) -> bool:
        """Whether somebody reads, and so will find an error or an EOF by themselves."""
        return (self._task is not None or self._on_message is not None) and self.reading

    @property
    def dispatching(self) -> bool:
        """Whether a dispatch runs, paused or not."""
        return self._on_message is not None

    @property
    def delivering(self) -> bool:
        """Whether a dispatch runs that is not paused."""
        return self._on_message is not None and self.reading

    def _see_eof(self) -> None:
        if self.reset_error is not None:
            self._owner.on_receive_failed(self.reset_error)
        else:
            self.eof = True
            self._owner.on_eof()

    def has_unread(self) -> bool:
        """Whether there is input nobody has read. False at EOF and on a broken socket."""
        try:
            return bool(self.buffer.size or peek(self._sock))
        except OSError:
            return False

    def has_more(self) -> bool:
        """`has_unread`, but for what a running dispatch has been given and leaves."""
        try:
            return bool((self.buffer.size and not self.delivering) or peek(self._sock))
        except OSError:
            return False

    def watch_for_end(self) -> None:
        """From now on tell the owner of the EOF as soon as it is next to be read."""
        self._watching = True
        if not self.busy:
            self._look_for_end()

    def _look_for_end(self) -> None:
        """Nobody reads, and the poller saw something that may be the end.

        What came before a reset can still be read, but a paused dispatch must hear of it.
        """
        try:
            unread = peek(self._sock)
        except OSError as error:
            self._owner.on_receive_failed(error)
            return
        channel = self.channel
        if unread is None:
            # Or the event was meant for a former owner of this descriptor.
            channel.failed = False
            if self._watching:
                channel.want_read()
        elif (
            channel.failed
            and (self.dispatching or not unread)
            and (pending := pending_error(self._sock))
        ):
            self._owner.on_receive_failed(pending)
        elif self._watching and not unread and not self.buffer.size:
            self._see_eof()
