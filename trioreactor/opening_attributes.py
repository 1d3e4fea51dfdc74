"""OpeningAttributes: what comes before the first byte of a connection's user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trioreactor.state import ConnectionState

if TYPE_CHECKING:
    from trioreactor.lifecycle import Lifecycle
    from trioreactor.write_half import WriteHalf


class OpeningAttributes:
    """For handshakes: a connection that is CONNECTING becomes CONNECTED by `opened`."""

    __slots__ = ()

    _life: Lifecycle
    _write: WriteHalf

    def opened(self) -> None:
        """What comes before the first byte of its user's is done: from CONNECTING to CONNECTED.

        Raises `IllegalStateTransition` in any other state.
        """
        self._life.opened()

    def send_opening(self, data: bytes) -> None:
        """While CONNECTING: send what comes first of all, such as a PROXY protocol header.

        Raises `RuntimeError` once it is open. On a connection that has ended, errors as of `send`.
        """
        if self._life.state is not ConnectionState.CONNECTING or self._life.ending.broken:
            raise self._life.not_opening()
        self._write.enqueue(data)
        self._write.flush()
