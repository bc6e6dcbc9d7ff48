"""Views as text."""

import time
from typing import Any

import pytest
from rich.console import Console, RenderableType

from orchestrator.cli import show
from orchestrator.cli.loading import Lines, Step, step_of


def device(**changed: Any) -> dict[str, Any]:
    numbers = {
        "capacity": 1000,
        "used": 500,
        "reserved": 600,
        "kept_back": 100,
        "available": 300,
        "foreign": 7,
    }
    view = {"id": "GPU-1", "index": 0, "name": "RTX", "kind": "gpu", "headroom_mib": 100}
    return view | {f"{key}_mib": value for key, value in numbers.items()} | changed


def model(name: str = "alpha", state: str = "stopped", **more: Any) -> dict[str, Any]:
    footprint = {"gpu_mib": 700, "host_mib": 20, "source": "declared"}
    return {"id": name, "state": state, "pinned": False, "idle_after_s": 900.0, "footprint": footprint} | more


def running(name: str = "alpha", state: str = "ready", **more: Any) -> dict[str, Any]:
    memory = {"GPU-1": {"reserved_mib": 600, "used_mib": 500}}
    instance = {"attempt": "a-1", "in_flight": 2, "for_s": 75.0, "memory": memory}
    return model(name, state, instance=instance | more)


def state(*models: dict[str, Any], devices: Any = None, queue: Any = ()) -> dict[str, Any]:
    return {"devices": devices or [device()], "models": list(models), "queue": list(queue)}


def text_of(screen: RenderableType, width: int = 160) -> str:
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(screen)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def row(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [part.strip() for part in line.split("  ") if part.strip()]


def test_a_device_shows_its_numbers_and_a_bar() -> None:
    cells = row(text_of(show.state_screen(state())), "GPU 0")
    assert cells[0:2] == ["GPU 0", "RTX"]
    assert cells[3:] == ["500", "600", "300", "1000", "7"]


def foreign(pid: int, name: str, used_mib: int, container: str = "", known_as: str = "") -> dict[str, Any]:
    place = {"container": container or None, "container_name": known_as or None}
    return {"pid": pid, "name": name, "used_mib": used_mib} | place


COMFY, NAMELESS = "c0" * 32, "07" * 32


def test_who_else_has_memory_is_said_under_the_devices() -> None:
    others = [
        foreign(812, "Xorg", 300),
        foreign(10, "python3", 12000, COMFY, "home-comfyui-1"),
        foreign(11, "python3", 288, COMFY, "home-comfyui-1"),
        foreign(12, "whisper", 400, NAMELESS),
        foreign(813, "firefox", 90),
        foreign(814, "code", 10),
    ]
    lines = text_of(show.state_screen(state(running(), devices=[device(foreign=others)]))).splitlines()
    assert lines[2:4] == [
        "· not ours on GPU 0: home-comfyui-1 (container) 12288 MiB, whisper (PID 12) in container "
        "070707070707 400 MiB, Xorg (PID 812) 300 MiB, 2 more 100 MiB",
        "",
    ]


def test_a_container_without_a_name_says_how_many_processes_it_has() -> None:
    others = [foreign(12, "whisper", 400, NAMELESS), foreign(13, "whisper", 200, NAMELESS)]
    text = text_of(show.state_screen(state(devices=[device(foreign=others)])))
    assert "· not ours on GPU 0: 2 processes in container 070707070707 600 MiB" in text


def test_memory_of_no_process_is_shown_where_it_is_much() -> None:
    text = text_of(show.state_screen({"devices": [device(unexplained_mib=9000)], "models": [], "queue": []}))
    assert "· not ours on GPU 0: 9000 MiB of no process" in text
    little = text_of(show.state_screen({"devices": [device(unexplained_mib=9)], "models": [], "queue": []}))
    assert "not ours" not in little


def test_nothing_is_said_where_nobody_else_has_memory() -> None:
    devices = [device(foreign=[]), device(error="it left the bus")]
    assert "not ours" not in text_of(show.state_screen(state(devices=devices)))


def test_a_foreign_name_cannot_command_the_terminal() -> None:
    text = text_of(show.state_screen(state(devices=[device(foreign=[foreign(1, "\x1b[2Jx", 5)])])))
    assert "[2Jx (PID 1) 5 MiB" in text
    assert "\x1b" not in text


def test_what_a_gpu_has_reported_is_said_for_a_day() -> None:
    def reported(hours: float) -> dict[str, Any]:
        return {"at": time.time() - 3600 * hours, "xid": 31, "text": f"XID 31 of {hours} h"}

    def said(*hours: float) -> str:
        return text_of(show.state_screen(state(devices=[device(incidents=[reported(h) for h in hours])])))

    assert "! GPU 0 reported XID 31 of 2 h (2 h ago)" in said(30, 2)
    assert "! GPU 0 reported XID 31 of 1 h (1 h ago, and 1 before)" in said(30, 23, 1)
    assert "reported" not in said(30, 25)


def test_what_was_chosen_for_a_model_is_said() -> None:
    text = text_of(show.state_screen(state(running(parameters={"context_size": 65536}))))
    assert "· alpha runs with context_size: 65536" in text
    assert "runs with" not in text_of(show.state_screen(state(running(parameters={}))))


def test_the_bar_is_in_proportion() -> None:
    assert show.memory_bar(device(), 20).plain == "█" * 10 + "▒" * 2 + "·" * 6 + "░" * 2


@pytest.mark.parametrize(
    "numbers",
    [
        {"used_mib": 5000, "available_mib": 0},
        {"used_mib": 1, "kept_back_mib": 1, "available_mib": 998},
        {"used_mib": 0, "kept_back_mib": 0, "available_mib": 0},
        {"used_mib": 990, "kept_back_mib": 0, "available_mib": -40},
        {"capacity_mib": 0, "available_mib": 0},
    ],
)
def test_a_bar_always_has_its_width(numbers: dict[str, int]) -> None:
    assert len(show.memory_bar(device(**numbers), 16).plain) == 16


def test_what_runs_has_a_row_and_the_rest_a_name() -> None:
    text = text_of(show.state_screen(state(running(), model("beta"), model("gamma"))))
    assert row(text, "alpha") == ["alpha", "ready", "GPU 0", "500 / 600", "2", "1 min 15 s", "15 min"]
    assert "Not loaded: beta, gamma" in text


def test_memory_of_gpus_and_of_ram_is_told_apart() -> None:
    ram = device(id="host", index=None, kind="host", name="RAM")
    gib, rest = {"reserved_mib": 600, "used_mib": 500}, {"reserved_mib": 60, "used_mib": 13}
    both = running(memory={"GPU-1": gib, "host": rest})
    text = text_of(show.state_screen(state(both, devices=[device(), ram])))
    assert "500 / 600, RAM 13 / 60" in row(text, "alpha")
    lost = running(memory={"GPU-1": gib | {"used_mib": None}, "host": rest})
    text = text_of(show.state_screen(state(lost, devices=[device(), ram])))
    assert "? / 600, RAM 13 / 60" in row(text, "alpha"), "what cannot be measured is not zero"
    alone = text_of(show.state_screen(state(running(memory={"host": rest}), devices=[ram])))
    assert "13 / 60" in row(alone, "alpha")
    without_gpu = text_of(show.state_screen(state(model("beta"), devices=[ram]), with_all=True))
    assert "needs 720" in row(without_gpu, "beta")


def test_what_is_lacking_is_said_in_a_line() -> None:
    lacking = device(available_mib=0, overcommitted_mib=436, headroom_mib=512, kept_back_mib=30)
    text = text_of(show.state_screen(state(devices=[lacking])))
    line = (
        "GPU 0 is overcommitted by 436 MiB: so much less is free than 512 MiB of headroom and 30 MiB promised"
    )
    assert f"! {line}\n" in text
    claimed = lacking | {"holders": [{"holder": "a", "state": "claimed"}]}
    text = text_of(show.state_screen(state(devices=[claimed])))
    assert "· GPU 0: 436 MiB of what was promised are still to come from those who leave" in text
    assert "436" not in text_of(show.state_screen(state(devices=[device(overcommitted_mib=0)])))


@pytest.mark.parametrize("width", [62, 70, 80, 100, 110, 115, 120, 130, 160])
def test_no_line_of_a_device_is_broken(width: int) -> None:
    told = {"utilization_percent": 100, "temperature_c": 91, "power_w": 350}
    card = device(name="NVIDIA GeForce RTX 3090", capacity_mib=24176, telemetry=told)
    ram = device(id="host", index=None, kind="host", name="RAM")
    lines = text_of(show.state_screen(state(devices=[card, ram]), width=width), width).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["DEVICE", "GPU", "RAM"]
    assert ("█" in lines[1]) == (width >= 70)


def test_all_gives_every_model_a_row() -> None:
    text = text_of(show.state_screen(state(model("beta")), with_all=True))
    assert row(text, "beta") == ["beta", "not loaded", "–", "needs 700, RAM 20", "–", "–", "15 min"]
    assert "Not loaded:" not in text
    flexible = model("beta", footprint={"gpu_mib": 700, "host_mib": 20, "is_least": True})
    text = text_of(show.state_screen(state(flexible), with_all=True))
    assert "needs at least 700, RAM 20" in row(text, "beta")


def test_progress_stands_beside_the_state() -> None:
    text = text_of(
        show.state_screen(state(running(state="starting", progress={"stage": "loading", "value": 0.5})))
    )
    assert row(text, "alpha")[1] == "starting 50 %"


def test_what_is_wrong_is_said_below() -> None:
    failure = {
        "message": "it exited with code 3",
        "failures": 2,
        "log_tail": ["boom [red]", ""],
        "next_try_in_s": 4.0,
    }
    models = [
        model("a", "failed", failure=failure),
        model("b", problem="no such file."),
        model("c", held_for_s=90.0),
        model("d", "queued"),
    ]
    queue = [{"model": "d", "waiting": 1, "for_s": 2.0, "reason": "a is busy"}]
    text = text_of(show.state_screen(state(*models, devices=[device(error="it left the bus")], queue=queue)))
    assert (
        "✗ a failed 2 times: it exited with code 3. Its last words: “boom [red]”. "
        "A request is not tried again for 4.0 s. (orchestrator logs a)"
    ) in text
    assert "! b cannot be loaded: no such file." in text
    assert "! c is kept out for another 1 min 30 s" in text
    assert "… d waits: a is busy" in text
    assert "✗ GPU 0 gets nothing: it left the bus" in text


def test_nobody_is_sent_to_a_log_that_does_not_exist() -> None:
    failure = {"message": "there is no image x:1", "failures": 1, "log_tail": [], "next_try_in_s": None}
    missing = model("a", "failed", failure=failure | {"has_log": False})
    text = text_of(
        show.state_screen(state(missing, model("b", "failed", failure=failure | {"has_log": True})))
    )
    assert "a failed: there is no image x:1." in text
    assert "logs a" not in text
    assert "(orchestrator logs b)" in text


def test_a_model_cannot_command_the_terminal() -> None:
    failure = {"message": "x", "failures": 1, "log_tail": ["\x1b[2J\x9bgone"], "next_try_in_s": None}
    text = text_of(show.state_screen(state(model("a", "failed", failure=failure))))
    assert "\x1b" not in text
    assert "\x9b" not in text


def test_everything_fits_a_narrow_terminal() -> None:
    text = text_of(show.state_screen(state(running("alpha-model-7b", pinned=True)), width=80), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert row(text, "GPU 0")[-1] == "7"


def test_checks_show_what_to_do() -> None:
    checks = [
        {"name": "store", "status": "ok", "found": "state.db", "advice": ""},
        {"name": "engine docker", "status": "bad", "found": "no answer", "advice": "Start it."},
    ]
    text = text_of(show.checks_screen({"checks": checks}))
    assert row(text, "✓") == ["✓", "store", "state.db"]
    assert row(text, "✗") == ["✗", "engine docker", "no answer"]
    assert "→ Start it." in text
    assert show.checks_summary({"checks": checks}).plain == "1 problem, 0 warnings."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.9, "9.9 s"),
        (12.3, "12 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


@pytest.mark.parametrize(
    ("operation", "step"),
    [
        ({"phase": "queued", "message": "beta is busy"}, Step("waiting: beta is busy")),
        ({"phase": "claimed", "message": "beta leaves"}, Step("making room: beta leaves")),
        ({"phase": "starting", "message": ""}, Step("starting")),
        (
            {"phase": "starting", "progress": {"stage": "pulling image", "value": 0.25}},
            Step("pulling image", 0.25),
        ),
        ({"phase": "stopping", "message": ""}, Step("its earlier instance stops")),
        ({"phase": "stopping", "kind": "unload"}, Step("stopping")),
        ({"phase": "draining", "kind": "unload"}, Step("its requests in flight end; --force would cut them")),
        ({"phase": "something-new"}, Step("something-new")),
        ({}, Step("waiting")),
    ],
)
def test_steps_of_a_load(operation: dict[str, Any], step: Step) -> None:
    assert step_of(operation) == step


def test_in_a_pipe_a_wait_is_no_new_line_for_each_second(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("d")
    waits = {"kind": "load", "state": "running", "phase": "queued"}
    for seconds in (3, 2, 1):
        lines(waits | {"message": f"b (busy with {seconds} requests, may be asked in {seconds} s)"})
    lines(waits | {"phase": "claimed", "message": "it waits for b to finish 1 request"})
    assert capsys.readouterr().err.splitlines() == [
        "d: waiting: b (busy with 3 requests, may be asked in 3 s)",
        "d: making room: it waits for b to finish 1 request",
    ]
