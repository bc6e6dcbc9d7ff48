"""The API against its own description: schemathesis draws requests, right and wrong, from /openapi.json.

Every answer must be one that the description allows: no 5xx but a documented 503, no hang, no status, type,
field or shape that is not described, and nothing without the key that it asks for. The same examples each
time; API_FUZZ_EXAMPLES=1000 draws so many for each operation, new ones each time.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.talk import assert_unharmed, http_client, oddity_service, problem
from tests.hub.server import hub_server
from tests.server import RunningServer, mimic_service, running_server

EXAMPLES = int(os.environ.get("API_FUZZ_EXAMPLES", "0"))
SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))
LIMIT_S = 400.0 + 10 * EXAMPLES  # a busy machine takes ten times the 10 s that it needs
MODELS: dict[str, dict[str, Any]] = {
    "alpha": {"aliases": ["al"]},
    "odd": {"service": "odd"},
    "plain": {"service": "plain"},
    "broken": {"environment": {"MIMIC_START": "exit:3"}},
    "huge": {"memory": "64GiB"},
}
DOWNLOADED = "acme/tiny-GGUF"

CONFIG = """
request-timeout = 20.0
max-stream-events = 1
continue-on-failure = true
max-failures = 20
warnings = false

[cache]
enabled = false

[generation]
database = "none"

[dictionaries.models]
values = {models}

[parameters]
"path.model" = {{ dictionary = "models", probability = 0.7 }}
"query.model" = {{ dictionary = "models", probability = 0.7 }}
"body.model" = {{ dictionary = "models", probability = 0.7 }}

[checks.not_a_server_error]
expected-statuses = ["2XX", "4XX", 503]

# It takes nothing and may say nothing for long; the stream that begins with a snapshot is read up to that.
[[operations]]
include-path = ["/models/sse"]
enabled = false

# A schema cannot say that `hold` and `expires_in` may not be zero.
[[operations]]
include-path = ["/models/unload", "/keys"]
checks.positive_data_acceptance.expected-statuses = ["2XX", 400, 404, 409, 503]

# With ?model= it is relayed: then method, query and all are for the service to judge.
[[operations]]
include-path = ["/props"]
checks.unsupported_method.enabled = false
checks.positive_data_acceptance.enabled = false
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("fuzz")
    marks = folder / "marks"
    services = {
        "mimic": mimic_service(),
        "odd": oddity_service(marks),
        "plain": oddity_service(marks, api="http"),
        "llama-cpp": oddity_service(marks, memory="gguf", environment={"MODEL_PATH": "{path}"}),
    }
    with (
        hub_server() as hub,
        running_server(folder, {**MODELS, "kept": {}}, services, env=hub.env) as server,
    ):
        with server.client() as client:
            server.key = client.create_key("tests", ["admin"])["key"]
        hub.add(DOWNLOADED, {"tiny-Q4_K_M.gguf": b"no GGUF at all"})
        server.load("kept")  # nobody unloads it, so each snapshot has an instance to describe
        with http_client(server, key=server.key) as http:
            problem(http.post("/models/load", json={"model": "broken", "wait": True}), 503, "service_failed")
            asked = http.post("/models", json={"model": DOWNLOADED})
            assert asked.status_code == 200, asked.text
        yield server


@pytest.fixture(autouse=True)
def healthy_afterwards(server: RunningServer) -> Iterator[None]:
    """The server is as it was: ready, nobody waits or is counted, and its loop still turns."""
    yield
    assert_unharmed(server, "odd", "alpha")


def kinds_of_events(server: RunningServer) -> set[str]:
    with http_client(server, key=server.key) as http:
        return {event["kind"] for event in http.get("/log?limit=1000").json()["events"]}


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The same description with no room for fields that it does not name."""
    document = copy.deepcopy(document)
    for shape in document["components"]["schemas"].values():
        if "properties" in shape:
            shape.setdefault("additionalProperties", False)
    return document


def fuzz(server: RunningServer, folder: Path, models: list[str], *arguments: str) -> None:
    """Run schemathesis on the server's description. Raises AssertionError with what it says."""
    with http_client(server, key=server.key) as http:
        document = closed(http.get("/openapi.json").json())
    (folder / "openapi.json").write_text(json.dumps(document))
    (folder / "schemathesis.toml").write_text(CONFIG.format(models=json.dumps(models)))
    command = [SCHEMATHESIS, "--config-file", "schemathesis.toml", "run", "openapi.json", "--url", server.url]
    command += ["--header", f"Authorization: Bearer {server.key}"]
    how = ["-n", str(EXAMPLES)] if EXAMPLES else ["-n", "8", "--generation-deterministic"]
    ended = subprocess.run(
        [*command, "--no-color", *how, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Test cases:" in ended.stdout


@pytest.mark.timeout(LIMIT_S + 60)
def test_the_api_answers_as_it_is_described(server: RunningServer, tmp_path: Path) -> None:
    """With the calls that one answer leads to: a load's operation, a model's log."""
    fuzz(server, tmp_path, [*MODELS, "al", "nope", DOWNLOADED], "--exclude-tag", "relayed")
    # So it has tried more than what is refused.
    assert {"ready", "failed", "downloaded"} <= kinds_of_events(server)


@pytest.mark.timeout(LIMIT_S + 60)
def test_what_is_relayed_answers_as_it_is_described(server: RunningServer, tmp_path: Path) -> None:
    """Without `broken`, for which a request may wait until its next try is due."""
    models = [name for name in MODELS if name != "broken"]
    phases = ("--phases", "examples,coverage,fuzzing")
    judged = ("--exclude-checks", "unsupported_method,positive_data_acceptance")  # by the service alone
    fuzz(server, tmp_path, [*models, "al", "nope"], "--include-tag", "relayed", *phases, *judged)
