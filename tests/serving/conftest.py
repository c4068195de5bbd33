"""A client that the tests of one file share, and an end to every test that hangs."""

import signal

import pytest

from tests.serving.helpers import client


@pytest.fixture(scope="module")
def shared_client():
    with client(chunk=8) as talk:
        yield talk


@pytest.fixture(autouse=True)
def alarm(request):
    """Raises TimeoutError in a test that has not ended in time: no failing test hangs. Not on Windows."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    seconds = 300 if request.node.get_closest_marker("slow") else 30

    def ring(number, frame):
        raise TimeoutError(f"the test has not ended within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, where the test's clearing up hangs too
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
