"""A real server on simulated GPUs, seen by its clients and by the device; nothing of it is imported."""

import asyncio
import inspect
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import httpx

from tests.e2e.recorder import Recorder
from tests.nvml.simulated import DEFAULT_GPUS, SimulatedGpus
from tests.server import RunningServer, mimic_service, running_server

T = TypeVar("T")

WAIT_S = 20.0
SIMULATED = "/simulated"  # the device's folder inside a container
AT_REST = ("stopped", "failed")
USABLE_MIB = 24576 - 400 - 512
"""What one default GPU has for models: without the driver's reserve and the headroom."""


def mimic(mib: int, **entry: Any) -> dict[str, Any]:
    """A catalogue entry that declares `mib` and takes exactly that.

    Keywords of the catalogue are passed on; every other one is a MIMIC_ variable: `load_s=1`.
    """
    of_catalogue = {"idle_after", "priority", "pinned", "deadline", "start_timeout", "drain_limit", "gpus"}
    of_catalogue |= {"service", "queue_limit", "container_name"}
    mimics = {f"MIMIC_{key.upper()}": str(value) for key, value in entry.items() if key not in of_catalogue}
    fields = {key: value for key, value in entry.items() if key in of_catalogue}
    return {
        "service": "mimic",
        "memory": f"{mib}MiB",
        "environment": {"MIMIC_MIB": str(mib), **mimics},
        **fields,
    }


@dataclass
class House:
    """A server, the GPUs it manages, and the engine it starts models with."""

    server: RunningServer
    gpus: SimulatedGpus
    engine: str


@dataclass(frozen=True)
class Engine:
    """How this run of the tests starts models: `image` is None for host processes."""

    name: str
    image: str | None = None
    network: str | None = None

    def service(self, gpus: SimulatedGpus, **more: Any) -> dict[str, Any]:
        """service.yaml of the mimics on these GPUs."""
        entry = mimic_service(environment={"MIMIC_NAME": "{model}"}, **more)
        if self.image is None:
            return entry
        in_container = {"SIMULATED_NVML_DIR": SIMULATED}
        volumes = {str(gpus.root): SIMULATED}
        return entry | {"image": self.image, "container_environment": in_container, "volumes": volumes}

    def settings(self, gpus: SimulatedGpus) -> dict[str, Any]:
        if self.image is None:
            return {"engine": "process"}
        return {
            "engine": "docker",
            "docker_network": self.network,
            "gpu_access": "none",
            "mount_roots": [str(gpus.root.parent)],
        }


@contextmanager
def open_house(
    folder: Path,
    engine: Engine,
    models: Mapping[str, Any],
    *,
    gpus: Sequence[tuple[str, int, int]] = DEFAULT_GPUS,
    shared_gpus: SimulatedGpus | None = None,
    settings: Mapping[str, Any] | None = None,
    services: Mapping[str, Mapping[str, Any]] | None = None,
    starts: bool = True,
) -> Iterator[House]:
    """A server in `folder` with these models, ready. `services` are further kinds of mimics, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    simulated = shared_gpus or SimulatedGpus.create(folder / "gpus", gpus)
    kinds = {"mimic": {}, **(services or {})}
    with running_server(
        folder,
        models=models,
        services={name: engine.service(simulated, **more) for name, more in kinds.items()},
        settings={"devices": "nvml", **engine.settings(simulated), **(settings or {})},
        env=simulated.env,
        starts=starts,
    ) as server:
        yield House(server, simulated, engine.name)


@overload
async def until(ask: Callable[[], Awaitable[T]], timeout_s: float = WAIT_S, what: str = "") -> T: ...
@overload
async def until(ask: Callable[[], T], timeout_s: float = WAIT_S, what: str = "") -> T: ...
async def until(ask: Callable[[], Any], timeout_s: float = WAIT_S, what: str = "") -> Any:
    """Ask until the answer is true, and return it. Raises AssertionError with the last answer."""
    until_s = time.monotonic() + timeout_s
    while True:
        answer = ask()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < until_s, (
            f"after {timeout_s} s still {answer!r}: {what or inspect.getsource(ask)}"
        )
        await asyncio.sleep(0.01)


@dataclass
class Stream:
    """A streamed chat as its client sees it."""

    model: str
    status: int = 0
    texts: list[str] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    refusal: dict[str, Any] = field(default_factory=dict)
    is_complete: bool = False
    was_cut: bool = False
    ended_s: float = 0.0
    task: "asyncio.Task[None] | None" = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    async def wait_begun(self) -> "Stream":
        """Until the answer's head is there."""
        await asyncio.wait_for(self.begun.wait(), WAIT_S)
        assert self.status == 200, f"{self.status}: {self.refusal}"
        return self

    async def wait_end(self, timeout_s: float = WAIT_S) -> "Stream":
        assert self.task is not None
        await asyncio.wait_for(asyncio.shield(self.task), timeout_s)
        return self

    async def leave(self) -> None:
        """Hang up."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def read(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        try:
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                self.status = answer.status_code
                if self.status != 200:
                    self.refusal = json.loads(await answer.aread())["error"]
                self.begun.set()
                async for line in answer.aiter_lines():
                    self._take(line)
        except httpx.TransportError:
            self.was_cut = True
        finally:
            self.ended_s = time.monotonic()
            self.begun.set()

    def _take(self, line: str) -> None:
        if line.startswith(":"):
            self.comments.append(line)
        elif line == "data: [DONE]":
            self.is_complete = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self.errors.append(event["error"])
            else:
                self.texts += [choice["delta"].get("content", "") for choice in event["choices"]]


def whole_text(model: str, tokens: int) -> str:
    """What a mimic of this name answers, if nothing of it is lost."""
    return "".join([model, *(f" {number}" for number in range(1, tokens))])


class World:
    """One test's view of a house: its clients, and what the device showed meanwhile."""

    def __init__(self, house: House, http: httpx.AsyncClient, seen: Recorder) -> None:
        self.house = house
        self.server = house.server
        self.gpus = house.gpus
        self.engine = house.engine
        self.http = http
        self.seen = seen
        self.streams: list[Stream] = []
        self.known_refusals = house.gpus.overbooked()
        self._log_mark = 0

    # --- asking as clients do

    def chat_body(self, model: str, **mimic: Any) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": "hello"}], "mimic": mimic}

    async def chat(
        self, model: str, headers: Mapping[str, str] | None = None, **mimic: Any
    ) -> httpx.Response:
        body = self.chat_body(model, **mimic)
        return await self.http.post("/v1/chat/completions", json=body, headers=dict(headers or {}))

    def ask(self, model: str, **mimic: Any) -> "asyncio.Task[httpx.Response]":
        """A chat in the background."""
        return asyncio.create_task(self.chat(model, **mimic))

    def stream(self, model: str, tokens: int = 8, **mimic: Any) -> Stream:
        """A streamed chat in the background."""
        stream = Stream(model)
        body = self.chat_body(model, tokens=tokens, **mimic) | {"stream": True}
        stream.task = asyncio.create_task(stream.read(self.http, body))
        self.streams.append(stream)
        return stream

    async def busy(self, model: str, tokens: int = 8) -> Stream:
        """Load the model and keep it busy with a stream that stands still until `let_flow`."""
        await self.load(model)
        await self.hold(model)
        return await self.stream(model, tokens).wait_begun()

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def load(self, model: str, **more: Any) -> dict[str, Any]:
        """Load and wait until it is ready."""
        answer = await self.post("/models/load", model=model, wait=True, **more)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def unload(self, model: str, **more: Any) -> dict[str, Any]:
        answer = await self.post("/models/unload", model=model, **more)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    @contextmanager
    def refusals_expected(self) -> Iterator[None]:
        """Meanwhile the device must refuse somebody memory, since somebody takes more than it declared."""
        yield
        refused = self.gpus.overbooked()
        assert len(refused) > len(self.known_refusals), "the device refused nobody"
        self.known_refusals = refused

    # --- looking from outside

    async def get(self, path: str) -> dict[str, Any]:
        answer = await self.http.get(path)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def view(self, model: str) -> dict[str, Any]:
        return await self.get(f"/models/{model}")

    async def wait_state(self, model: str, *states: str) -> dict[str, Any]:
        """Wait until the model is in one of these states, and return its view."""

        async def there() -> dict[str, Any]:
            view = await self.view(model)
            return view if view["state"] in states else {}

        return await until(there, what=f"'{model}' should be {' or '.join(states)}")

    async def wait_queued(self, model: str, waiting: int = 1) -> None:
        async def there() -> bool:
            queue = (await self.get("/state"))["queue"]
            return any(entry["model"] == model and entry["waiting"] == waiting for entry in queue)

        await until(there, what=f"{waiting} should wait for '{model}'")

    async def wait_holding(self, model: str) -> dict[int, int]:
        """Wait until the device shows memory of the model."""
        return await until(lambda: self.seen.holding(model), what=f"'{model}' should hold memory")

    async def wait_gone(self, model: str) -> None:
        """Wait until the device shows no memory of the model."""
        await until(lambda: not self.seen.holding(model), what=f"'{model}' should hold no memory")

    async def wait_sample(self) -> None:
        """Wait until the server has measured its devices after this moment, and taken that in."""
        asked_s = time.monotonic()

        async def there() -> bool:
            age_s = float((await self.get("/state"))["sample_age_s"])
            return time.monotonic() - age_s > asked_s + 0.1

        await until(there, what="a newer sample should come")

    async def device(self, index: int = 0) -> dict[str, Any]:
        """The GPU's entry in GET /devices; `index` is where the simulated machine has it now."""
        uuid = self.gpus.uuids[index]
        (found,) = (d for d in (await self.get("/devices"))["devices"] if d["id"] == uuid)
        return dict(found)

    async def wait_unknown(self, index: int = 0) -> str:
        """Wait until the server cannot measure this GPU, and return the reason it gives."""

        async def reason() -> str:
            return str((await self.device(index)).get("error", ""))

        return await until(reason, what=f"GPU {index} should be unknown")

    async def wait_known(self, index: int = 0) -> dict[str, Any]:
        """Wait until the server measures this GPU (again)."""

        async def there() -> dict[str, Any]:
            device = await self.device(index)
            return {} if "error" in device else device

        return await until(there, what=f"GPU {index} should be measured")

    async def wait_served(self, model: str) -> None:
        """Ask until the model answers; what refuses meanwhile must do so with a 503."""

        async def is_served() -> bool:
            answer = await self.chat(model)
            assert answer.status_code in (200, 503), answer.text
            return answer.status_code == 200

        await until(is_served, what=f"'{model}' should be served")

    async def notes(self, kind: str, model: str) -> list[str]:
        """Lines of the event log since this test began."""
        events = (await self.get(f"/log?limit=1000&model={model}"))["events"]
        return [e["text"] for e in events if e["id"] > self._log_mark and e["kind"] == kind]

    # --- the mimic itself, reached beside the gateway

    async def address(self, model: str) -> str:
        instance = (await self.view(model))["instance"]
        assert instance["address"], instance
        return f"http://{instance['address']}"

    async def stats(self, model: str) -> dict[str, int]:
        return dict((await self.http.get(f"{await self.address(model)}/stats")).json())

    async def hold(self, model: str) -> None:
        """Streams of this model stand still from now on."""
        await self._hold(model, True)

    async def let_flow(self, model: str) -> None:
        await self._hold(model, False)

    async def _hold(self, model: str, hold: bool) -> None:
        answer = await self.http.post(f"{await self.address(model)}/control/stream-hold", json={"hold": hold})
        assert answer.json() == {"hold": hold}

    # --- before and after a test

    async def begin(self) -> None:
        if not self.server.is_running:
            self.server.start()  # an earlier test ended it and failed
        events = (await self.get("/log?limit=1"))["events"]
        self._log_mark = max((e["id"] for e in events), default=0)

    async def end(self) -> None:
        """Leave an empty house to the next test; its server still answers."""
        for stream in self.streams:
            await stream.leave()
        self.gpus.heal()
        if self.server.is_running:
            models = (await self.get("/state"))["models"]
            loaded = [m["id"] for m in models if m["state"] not in AT_REST]
            await asyncio.gather(*(self.unload(model, force=True) for model in loaded))
            for model in loaded:
                await self.wait_gone(model)


@asynccontextmanager
async def open_world(house: House) -> AsyncIterator[World]:
    """A world for one test. In all that time no GPU may have been overbooked, nor a claim refused."""
    with Recorder(house.gpus).running() as seen, house.gpus.watch_overbooking(0.004) as overbooking:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=house.server.url, timeout=60, limits=limits, trust_env=False
        ) as http:
            world = World(house, http, seen)
            await world.begin()
            try:
                yield world
            finally:
                await world.end()
    assert overbooking.samples > 0
    assert seen.samples > 0
    assert overbooking.moments == []
    assert house.gpus.overbooked() == world.known_refusals
