"""DrainingAttributes: how a connection is told to finish, and how others hear of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from trioreactor.connection_callbacks import CallbackAttributes

if TYPE_CHECKING:
    from trioreactor.tcp_connection import TcpConnection


class DrainingAttributes(CallbackAttributes):
    """Finishing on request."""

    __slots__ = ()

    @property
    def draining(self) -> trio.Event:
        """Set when the server drains: finish what you are at and return."""
        if self._life.draining is None:
            self._life.draining = trio.Event()
        return self._life.draining

    def start_draining(self) -> None:
        """Set `draining` and call the draining callbacks, as a server's drain does. Idempotent."""
        if not self.draining.is_set():
            self.draining.set()
            callbacks, self._life.draining_callbacks = self._life.draining_callbacks, None
            for fn in callbacks or ():
                self._own_callbacks().call_soon(fn)

    def add_draining_callback(self, fn: Callable[[TcpConnection], object]) -> None:
        """Call *fn* with the connection when it drains, or soon if it does: for handlers made of
        callbacks, which cannot wait for `draining`. Errors as those of other callbacks.
        """
        if self.draining.is_set():
            self._own_callbacks().call_soon(fn)
        else:
            if self._life.draining_callbacks is None:
                self._life.draining_callbacks = []
            self._life.draining_callbacks.append(fn)
