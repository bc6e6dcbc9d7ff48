"""A settled server against what really is: engine, device and database, each asked itself."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import httpx

from tests.e2e.world import AT_REST, House, until
from tests.server import OWNER_LABEL

ATTEMPT_LABEL = "ai.orchestrator.attempt"
MODEL_LABEL = "ai.orchestrator.model"
SETTLE_S = 60.0
AGREE_S = 10.0


@dataclass
class Running:
    """What the engine runs or keeps for this server: models by attempt. `unstarted` were only created."""

    models: dict[str, str] = field(default_factory=dict)
    unstarted: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """An instance as the database has it."""

    model: str
    state: str
    attempt: str | None
    placement: Mapping[str, int]


def environment(pid: int) -> dict[str, str]:
    """A process's environment; empty for one that is gone (or a zombie)."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(line.split("=", 1) for line in variables if "=" in line)
    return {}


def running(house: House) -> Running:
    if house.engine == "process":
        found = Running()
        for pid in house.server.model_processes():
            variables = environment(pid)
            if attempt := variables.get("ORCHESTRATOR_ATTEMPT"):
                found.models[attempt] = variables.get("MIMIC_NAME", "?")
        return found
    return containers(house)


def containers(house: House) -> Running:
    found = Running()
    wanted = {"label": f"{OWNER_LABEL}={meta(house)['owner']}"}
    with contextlib.closing(docker.DockerClient.from_env(environment=dict(house.server.env))) as engine:
        for row in engine.api.containers(all=True, filters=wanted):
            model = row["Labels"][MODEL_LABEL]
            if row["State"] in ("running", "paused", "restarting"):
                found.models[row["Labels"][ATTEMPT_LABEL]] = model
            elif row["State"] == "created":
                found.unstarted[row["Labels"][ATTEMPT_LABEL]] = model
    return found


def claims(house: House) -> dict[str, int]:
    """MiB on all GPUs by the attempt that holds them; a process without an attempt has its PID here."""
    held: Counter[str] = Counter()
    for index in house.gpus.indices:
        for pid, mib in house.gpus.processes(index).items():
            held[environment(pid).get("ORCHESTRATOR_ATTEMPT", f"PID {pid}")] += mib
    return dict(held)


def query(house: House, statement: str) -> list[Any]:
    path = Path(house.server.settings["database"])
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20)) as database:
        return database.execute(statement).fetchall()


def meta(house: House) -> dict[str, str]:
    return dict(query(house, "SELECT key, value FROM meta"))


def rows(house: House) -> list[Row]:
    found = query(house, "SELECT model, state, attempt, placement FROM instance")
    return [Row(model, state, attempt, json.loads(placement)) for model, state, attempt, placement in found]


async def settle(http: httpx.AsyncClient) -> dict[str, Any]:
    """Wait until nothing is under way, and return the state."""

    async def still() -> dict[str, Any]:
        state = dict((await http.get("/state")).json())
        moving = [i["state"] for i in state["instances"] if i["state"] != "ready"]
        in_flight = [i["in_flight"] for i in state["instances"] if i["in_flight"]]
        waiting = [m["state"] for m in state["models"] if m["state"] not in ("ready", *AT_REST)]
        return state if not (moving or in_flight or waiting or state["queue"]) else {}

    return await until(still, SETTLE_S, "everything should settle")


async def audit(house: House, http: httpx.AsyncClient, agree_s: float = AGREE_S) -> list[str]:
    """What does not agree, in words, once nothing is under way; the server must have no new requests.

    Differences between engine, device and database count if they last for `agree_s`.
    """
    state = await settle(http)
    known = {i["attempt"]: i["model"] for i in state["instances"]}
    wrong = await agreed(house, known, agree_s)
    return wrong + reservations(state) + unfinished(house, known)


async def agreed(house: House, known: Mapping[str, str], agree_s: float) -> list[str]:
    """Engine, device and rows against what the server knows; differences that last."""
    wrong: list[str] = []

    def agrees() -> bool:
        found, held = running(house), claims(house)
        ready = {r.attempt: r.model for r in rows(house) if r.state not in AT_REST}
        wrong[:] = [
            *differences("the engine runs", found.models, known),
            *differences("the device shows memory of", dict.fromkeys(held, ""), dict.fromkeys(known, "")),
            *differences("the database has", {str(a): m for a, m in ready.items()}, known),
            *(f"'{m}': {attempt} was created and never started" for attempt, m in found.unstarted.items()),
        ]
        return not wrong

    with contextlib.suppress(AssertionError):
        await until(agrees, agree_s, "all should agree")
    return wrong


def differences(what: str, found: Mapping[str, str], known: Mapping[str, str]) -> list[str]:
    more = [f"{what} {key} {found[key]}, which the server does not know" for key in found if key not in known]
    less = [f"the server knows {key} {known[key]}, but not: {what}" for key in known if key not in found]
    twice = [model for model, count in Counter(found.values()).items() if model and count > 1]
    return more + less + [f"{what} more than one '{model}'" for model in twice]


def reservations(state: Mapping[str, Any]) -> list[str]:
    """Holders without a running instance."""
    ready = {i["model"] for i in state["instances"]}
    return [
        f"{holder['holder']} ({holder['state']}) holds {holder['reserved_mib']} MiB of {device['id']}"
        for device in state["devices"]
        for holder in device["holders"]
        if holder["holder"] not in ready or holder["state"] != "ready"
    ]


def unfinished(house: House, known: Mapping[str, str]) -> list[str]:
    """Operations that still run, and attempts whose history has no end, or one too early."""
    operations = query(house, "SELECT id, kind, model, state FROM operation WHERE ended_at IS NULL")
    attempts = query(house, "SELECT id, model, state FROM attempt WHERE ended_at IS NULL")
    ended = query(house, "SELECT id FROM attempt WHERE ended_at IS NOT NULL")
    return [
        *(f"operation {key} ({kind} '{model}') is still {state}" for key, kind, model, state in operations),
        *(f"attempt {key} of '{m}' is {state} for ever" for key, m, state in attempts if key not in known),
        *(f"attempt {key} has an end and runs" for (key,) in ended if key in known),
    ]
