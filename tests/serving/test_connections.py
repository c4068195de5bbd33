"""shared/serving/connections.py over real sockets: who says nothing, or hears nothing, is let go."""

import asyncio
import socket
import threading
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import pytest

from shared.serving.api import create_app
from shared.serving.connections import PunctualProtocol, punctual
from shared.serving.gate import Limits
from tests.helpers import serving
from tests.serving.helpers import TOKENIZER, gpt

LONG = 1000  # seconds: if this limit ended a connection, the test would have failed long before
REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextmanager
def served(app=None, **limits: float):
    """The address of a server with these limits, all others being far away."""
    everything = Limits(**({"header_seconds": LONG, "stalled_seconds": LONG, "body_seconds": LONG} | limits))
    app = app or create_app(gpt(), TOKENIZER, limits=everything)
    with serving(app, http=punctual(everything), timeout_keep_alive=LONG) as url:
        yield urlsplit(url)


@contextmanager
def connected(address):
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        yield connection


def everything_from(connection: socket.socket) -> bytes:
    """What comes until the server ends the connection. It raises TimeoutError where it does not."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    return data


def answer_to(connection: socket.socket, request: bytes) -> bytes:
    """A short answer, with which the connection does not end."""
    connection.sendall(request)
    data = b""
    while b'"ok"}' not in data:
        part = connection.recv(1 << 16)
        assert part, "the server has ended the connection"
        data += part
    return data


@pytest.mark.parametrize("sent", [b"", b"GET /hea", REQUEST[:-2], REQUEST[:-2] + b"X: 1\r\n"], ids=str)
def test_headers_that_do_not_come_end_a_connection(sent):
    with served(header_seconds=0.2) as address, connected(address) as connection:
        connection.sendall(sent)
        assert everything_from(connection) == b""


@pytest.mark.slow
def test_headers_that_come_byte_by_byte_are_not_waited_for_longer():
    with served(header_seconds=0.2) as address, connected(address) as connection:
        connection.settimeout(0.02)
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        ended = False
        for _ in range(1000):
            try:
                ended = ended or connection.recv(1) == b""
                connection.sendall(b"x")
            except TimeoutError:
                continue
            except OSError:
                ended = True
            if ended:
                break
        assert ended


@pytest.mark.slow
def test_a_later_request_of_a_connection_has_the_time_of_the_first():
    with served(header_seconds=1) as address, connected(address) as connection:
        for _ in range(2):
            assert answer_to(connection, REQUEST).startswith(b"HTTP/1.1 200")
        connection.sendall(REQUEST[:-3])
        assert everything_from(connection) == b""


def test_a_body_that_does_not_come_is_answered_and_ends_it():
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with served(body_seconds=0.2) as address, connected(address) as connection:
        connection.sendall(head + b"Content-Length: 50\r\n\r\n{")
        answer = everything_from(connection)
        assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()


@pytest.mark.slow
def test_a_client_that_takes_nothing_is_let_go():
    left, length = threading.Event(), 1 << 25

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * length, "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

    with served(app, stalled_seconds=0.2) as address, connected(address) as connection:
        connection.sendall(REQUEST)
        assert left.wait(30)  # nothing is read here
        received = 0
        with suppress(ConnectionResetError):
            while part := connection.recv(1 << 20):
                received += len(part)
        assert received < length


@pytest.mark.slow
def test_a_client_that_waits_for_its_answer_is_not_late():
    async def app(scope, receive, send):
        if scope["type"] == "http":
            assert (await receive())["type"] == "http.request"
            leaves = asyncio.create_task(receive())
            done, _ = await asyncio.wait([leaves], timeout=0.8)  # longer than a client has for its headers
            leaves.cancel()
            await send({"type": "http.response.start", "status": 500 if done else 200, "headers": []})
            await send({"type": "http.response.body", "body": b'"ok"}'})

    with served(app, header_seconds=0.5) as address, connected(address) as connection:
        assert answer_to(connection, REQUEST).startswith(b"HTTP/1.1 200")


def test_the_system_is_asked_to_notice_a_peer_that_is_gone(monkeypatch):
    made = []
    connection_made = PunctualProtocol.connection_made

    def note(self, transport):
        connection_made(self, transport)
        made.append(transport)

    monkeypatch.setattr(PunctualProtocol, "connection_made", note)
    with served(stalled_seconds=40) as address, connected(address) as connection:
        answer_to(connection, REQUEST)
        (transport,) = made
        assert transport.get_write_buffer_limits() == (0, 0)  # else a little that is not taken is no pause
        theirs = transport.get_extra_info("socket")
        assert theirs.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if hasattr(socket, "TCP_KEEPIDLE"):
            times = [
                theirs.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            ]
            assert times[0] + times[1] * times[2] == 40
