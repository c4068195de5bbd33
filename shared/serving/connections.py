"""Week 12. Connections on which nothing comes, or nothing is taken, are ended.

uvicorn waits without an end for a request's headers, and for a client that does not read its answer. Bodies
have their time in `shared.serving.gate`, and a connection between two requests in uvicorn itself.
"""

import asyncio
import socket
from typing import Any

from shared.extras import needs
from shared.serving.gate import Limits

with needs("serve"):
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol


class PunctualProtocol(H11Protocol):
    """uvicorn's HTTP protocol with a time for what a client has to do; `punctual` sets its limits."""

    limits: Limits

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._until_headers: asyncio.TimerHandle | None = None
        self._until_taken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called for a new connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # any byte that is not taken pauses writing
        _notice_a_peer_that_is_gone(transport, self.limits.stalled_seconds)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Called with what the client sends."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_timers(headers=True)
        elif self._until_headers is None:  # once for each request: no byte prolongs it
            self._expect_headers()

    def pause_writing(self) -> None:
        """Called when the client does not take what is sent."""
        super().pause_writing()
        self._until_taken = self.loop.call_later(self.limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Called when the client has taken all of it."""
        super().resume_writing()
        self._cancel_timers(taken=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called at the end of a connection."""
        self._cancel_timers(headers=True, taken=True)
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._until_headers = self.loop.call_later(self.limits.header_seconds, self.transport.close)

    def _cancel_timers(self, *, headers: bool = False, taken: bool = False) -> None:
        if headers and self._until_headers is not None:
            self._until_headers.cancel()
            self._until_headers = None
        if taken and self._until_taken is not None:
            self._until_taken.cancel()
            self._until_taken = None


def punctual(limits: Limits) -> type[H11Protocol]:
    """The protocol with these limits, for `uvicorn.Config(http=...)`."""

    class Protocol(PunctualProtocol):
        pass

    Protocol.limits = limits
    return Protocol


def _notice_a_peer_that_is_gone(transport: asyncio.Transport, seconds: float) -> None:
    """Has the operating system end a connection whose other end does not answer any more.

    A machine that loses its network says nothing: only asking shows it. Where a system has other names for
    these options, its own times hold.
    """
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = 4
    between = max(1, round(seconds / (2 * probes)))
    options = {
        "TCP_KEEPIDLE": probes * between,
        "TCP_KEEPINTVL": between,
        "TCP_KEEPCNT": probes,
        "TCP_USER_TIMEOUT": max(1, round(1000 * seconds)),
    }
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
