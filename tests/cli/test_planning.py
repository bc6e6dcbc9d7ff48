"""`orchestrator plan`: the screen, the JSON, the exit code."""

import json
from typing import Any

from orchestrator.cli.planning import plan_screen
from tests.cli.stub import Stub, error
from tests.cli.test_commands import run
from tests.cli.test_show import row, text_of


def planned(**changed: Any) -> dict[str, Any]:
    gpu = {"id": "GPU-1", "index": 0, "name": "RTX", "kind": "gpu"}
    numbers = {"takes_mib": 600, "available_mib": 100, "available_after_mib": 50, "capacity_mib": 1000}
    ram = {"id": "host", "index": None, "name": "RAM", "kind": "host"}
    left = {"takes_mib": 0, "available_mib": 700, "available_after_mib": 700, "capacity_mib": 900}
    return {
        "model": "beta",
        "state": "stopped",
        "outcome": "waits",
        "message": "'beta' would start once 'alpha' had left.",
        "devices": [gpu | numbers, ram | left],
        "parameters": {},
        "footprint": {"gpu_mib": 600, "host_mib": 0, "source": "declared", "breakdown": {}},
        "evictions": [
            {
                "model": "alpha",
                "frees_mib": {"GPU-1": 550},
                "why": "idle for 5 s; priority 50, reloads in 2.0 s",
            }
        ],
        "waits_for": "'alpha' to leave, and the memory to be seen free",
    } | changed


def refused() -> dict[str, Any]:
    fitting = {"context_size": 16384, "needs_mib": 800, "gpu_mib": 800, "host_mib": 20}
    refusal = {"status": 503, "code": "no_room_now", "message": "'beta' needs 2000 MiB."}
    return planned(
        outcome="refused", message=refusal["message"], refusal=refusal, would_fit=[fitting], evictions=[]
    )


def test_the_screen_says_where_it_goes_and_who_leaves() -> None:
    text = text_of(plan_screen(planned()))
    assert text.startswith("'beta' would start once 'alpha' had left.\n")
    assert row(text, "GPU 0") == ["GPU 0", "600", "100", "50", "1000"]
    assert row(text, "RAM") == ["RAM", "–", "700", "700", "900"]
    assert "It needs 600 MiB on the GPU (declared)." in text
    assert row(text, "alpha") == ["alpha", "550 of GPU 0", "idle for 5 s; priority 50, reloads in 2.0 s"]


def test_memory_of_which_more_is_promised_than_there_is_is_said_so() -> None:
    gpu, ram = planned()["devices"]
    text = text_of(plan_screen(planned(devices=[gpu | {"available_mib": 0, "overcommitted_mib": 436}, ram])))
    assert "! GPU 0 is overcommitted by 436 MiB now\n" in text
    assert "RAM is overcommitted" not in text
    assert "USABLE MiB" in text, "the capacity of ps has the headroom in it"


def test_the_screen_shows_the_parts_of_a_prediction() -> None:
    breakdown = {"gpu0": {"weights": 500, "kv_cache": 100}, "host": {"process": 30}}
    footprint = {"gpu_mib": 600, "host_mib": 30, "source": "predicted", "breakdown": breakdown}
    text = text_of(plan_screen(planned(footprint=footprint)))
    assert row(text, "NEEDS") == ["NEEDS", "GPU 0", "RAM"]
    assert row(text, "kv cache") == ["kv cache", "100"]
    assert row(text, "together") == ["together (predicted)", "600", "30"]


def test_the_parts_stand_under_the_gpu_that_the_model_would_go_to() -> None:
    first, ram = planned()["devices"]
    second = first | {"id": "GPU-2", "index": 1}
    footprint = {
        "gpu_mib": 600,
        "host_mib": 0,
        "source": "predicted",
        "breakdown": {"gpu0": {"weights": 600}},
    }
    idle = first | {"takes_mib": 0}
    text = text_of(plan_screen(planned(devices=[idle, second, ram], footprint=footprint)))
    assert row(text, "NEEDS") == ["NEEDS", "GPU 1"]
    nowhere = [device | {"takes_mib": 0} for device in (first, second, ram)]
    text = text_of(plan_screen(planned(devices=nowhere, footprint=footprint)))
    assert row(text, "NEEDS") == ["NEEDS", "GPU"]
    split = footprint | {"breakdown": {"gpu0": {"weights": 300}, "gpu1": {"weights": 300}}}
    text = text_of(plan_screen(planned(devices=nowhere, footprint=split)))
    assert row(text, "NEEDS") == ["NEEDS", "1st GPU", "2nd GPU"]


def test_the_sums_are_what_is_taken_however_the_parts_are_rounded() -> None:
    parts = {"weights": 300, "kv_cache": 301}
    footprint = {
        "gpu_mib": 1204,
        "host_mib": 31,
        "source": "predicted",
        "breakdown": {"gpu0": parts, "gpu1": parts, "host": {"process": 30}},
    }
    text = text_of(plan_screen(planned(footprint=footprint)))
    assert row(text, "together") == ["together (predicted)", "602", "602", "31"]


def test_what_is_not_known_is_not_said_to_be_nothing() -> None:
    footprint = {"gpu_mib": 0, "host_mib": 0, "source": "unknown", "breakdown": {}}
    text = text_of(plan_screen(planned(outcome="refused", footprint=footprint)))
    assert "What it needs is not known." in text
    assert "It needs 0 MiB" not in text


def test_the_screen_says_what_would_be_chosen() -> None:
    text = text_of(plan_screen(planned(parameters={"context_size": 65536, "n_gpu_layers": 37})))
    assert "Chosen for it: context_size: 65536, n_gpu_layers: 37." in text


def test_the_screen_says_what_would_fit() -> None:
    text = text_of(plan_screen(refused()))
    assert row(text, "context_size") == ["context_size: 16384", "800", "20"]
    assert "LEAVES" not in text


def test_a_device_that_cannot_be_measured_is_said_to_be_so() -> None:
    device = {"id": "GPU-1", "index": 0, "name": "RTX", "kind": "gpu", "takes_mib": 0, "error": "it is lost"}
    assert row(text_of(plan_screen(planned(devices=[device]))), "GPU 0") == ["GPU 0", "not measured"]


def test_it_asks_the_server_and_prints_its_json(stub: Stub) -> None:
    stub.answers["POST /plan"] = (200, planned())
    result = run(stub, "plan", "beta", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, planned())
    assert stub.asked == [("POST", "/plan", {"load": "beta"})]
    assert "'beta' would start" in run(stub, "plan", "beta").stdout


def test_a_refusal_is_an_answer_with_exit_code_1(stub: Stub) -> None:
    stub.answers["POST /plan"] = (200, refused())
    result = run(stub, "plan", "beta")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "'beta' needs 2000 MiB." in result.stdout
    stub.answers["POST /plan"] = (404, error("There is no model 'x'.", "model_not_found"))
    result = run(stub, "plan", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "There is no model 'x'." in result.stderr
