"""What only an engine can fill in, in both engines' own words."""

import pytest

from orchestrator.control.ports import StartOrder
from orchestrator.core.entities import Device, DeviceKind, Launch
from orchestrator.drivers.docker_spec import container_body
from orchestrator.drivers.late_placeholders import filled
from orchestrator.drivers.process_shell import wrapped_command

GPUS = tuple(Device(f"GPU-{n}", n, "card", DeviceKind.GPU, 1) for n in range(3))
TEXT = "--port {port} -ts {tensor_split} {other}"


@pytest.mark.parametrize(("count", "split"), [(0, "1"), (1, "1"), (2, "1,1"), (3, "1,1,1")])
def test_a_share_for_each_gpu(count: int, split: str) -> None:
    assert filled(TEXT, 8001, GPUS[:count]) == f"--port 8001 -ts {split} {{other}}"


def order() -> StartOrder:
    told = {"SPLIT": "{tensor_split}", "WHERE": "{port}"}
    words = ("sh", "-ts", "{tensor_split}")
    launch = Launch("s", "image", words, words, port=9, environment=told, container_environment=told)
    return StartOrder("a1", "m", launch, GPUS[:2])


def test_in_a_container() -> None:
    body = container_body(order(), "image", "me", "network")
    assert {"SPLIT=1,1", "WHERE=9"} <= set(body["Env"])
    assert body["Cmd"] == ["sh", "-ts", "1,1"]


def test_in_a_process() -> None:
    assert wrapped_command(order(), 8001, {"PATH": "/bin"})[-2:] == ["-ts", "1,1"]
