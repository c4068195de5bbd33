"""A client that the tests of one file share."""

import pytest

from tests.serving.helpers import client


@pytest.fixture(scope="module")
def shared_client():
    with client(chunk=8) as talk:
        yield talk
