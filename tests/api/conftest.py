"""What the modules share: a client of the module's own `server`."""

from collections.abc import Iterator

import httpx
import pytest

from tests.api.talk import http_client
from tests.server import RunningServer


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with http_client(server) as client:
        yield client
