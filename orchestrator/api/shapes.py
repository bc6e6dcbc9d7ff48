"""The shapes of answers, for the description at /openapi.json.

Answers are written by control/status.py and its like, and not validated on their way out; the tests hold
them against these shapes. Sizes in names ending `_mib` are MiB, times ending `_s` seconds, and `…_at` and
`at` are seconds since 1970. A field with a default may be missing.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.core.entities import DeviceKind, OperationKind, OperationState
from orchestrator.core.keys import Scope
from orchestrator.core.lifecycle import State
from orchestrator.core.preview import Outcome

Responses = dict[int | str, dict[str, Any]]


class Fault(BaseModel):
    """What went wrong. Some codes add details beside these."""

    model_config = ConfigDict(extra="allow")

    message: str = Field(min_length=1, description="What happened and what to do; show it.")
    type: Literal["invalid_request_error", "not_found_error", "server_error"]
    code: str | int = Field(description="A word for programs; the HTTP status on llama.cpp's own paths.")
    param: str | None = Field(description="The field that is wrong.")


class Error(BaseModel):
    """The one shape of every error of ours."""

    error: Fault


MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "A key is needed, or the one that was shown is not valid.",
    403: "The key's scopes do not allow it; or a page of another site asks for a change.",
    404: "There is no such thing; the message says what there is.",
    408: "The body did not arrive within `request_limit`.",
    409: "It can never work as it is; asking again is useless.",
    413: "The body is too large.",
    421: "The `Host` header is not one of this server's names.",
    502: "The service did not answer, or ended in the middle.",
    507: "It does not fit on the disk; the message has the numbers.",
    503: "It cannot be done now; the message says why, and `Retry-After` when to ask again.",
    504: "The answer took longer than `request_limit`.",
}


def errors(*statuses: int) -> Responses:
    """FastAPI's `responses` for errors of the one shape."""
    return {status: {"model": Error, "description": MEANINGS[status]} for status in statuses}


def answers(shape: Any, *statuses: int) -> Responses:
    """FastAPI's `responses`: 200 with this JSON, and these errors."""
    return {200: {"model": shape, "description": "As asked."}, **errors(*statuses)}


def plain_text(*statuses: int) -> Responses:
    """The same for text that comes as it is written."""
    return {200: stream("text/plain", {"schema": {"type": "string"}}), **errors(*statuses)}


def server_sent(*names: str) -> Responses:
    """The same for server-sent events whose data is JSON; without names they have none."""
    data = {"type": "string", "contentMediaType": "application/json"}
    fields: dict[str, Any] = {"data": data}
    if names:
        fields |= {"event": {"enum": list(names)}, "id": {"type": "string"}}
    item = {"type": "object", "properties": fields, "required": list(fields)}
    return {200: stream("text/event-stream", {"itemSchema": item})}


def stream(media_type: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": "As it comes.", "content": {media_type: content}}


class Progress(BaseModel):
    stage: str
    value: float = Field(ge=0, le=1)
    done_bytes: int | None = Field(None, description="Of a download.")
    total_bytes: int | None = Field(None, description="Of a download.")


class Status(BaseModel):
    """As llama.cpp's router has it."""

    value: Literal["unloaded", "loading", "loaded", "downloading"]
    failed: bool = False
    exit_code: int | None = Field(None, description="Of the last attempt, if that has ended.")
    progress: Progress | None = None


class ListedModel(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    aliases: list[str]
    status: Status
    can_remove: bool = Field(description="It was downloaded through this server: DELETE /models removes it.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ListedModel]


class Footprint(BaseModel):
    """What it needs, and where the number comes from. `breakdown` has each device's components in MiB."""

    is_least: bool = Field(
        False, description="Its entry says auto: the least on the GPU; it may be given more when placed."
    )
    gpu_mib: int
    host_mib: int
    source: str
    breakdown: dict[str, dict[str, int]] = {}


class FailureView(BaseModel):
    """Why the last attempt ended unasked, and when the next is due."""

    message: str
    code: str
    exit_code: int | None
    oom: bool
    log_tail: list[str]
    has_log: bool = Field(description="Whether anything ran that could have printed something.")
    failures: int
    next_try_in_s: float | None


class Held(BaseModel):
    reserved_mib: int
    used_mib: int | None = Field(description="Null where the device cannot be measured.")


class InstanceView(BaseModel):
    """The running, starting or stopping container or process of a model."""

    attempt: str
    state: State
    for_s: float
    in_flight: int
    requests: int
    idle_s: float | None = Field(description="Since its last use; null while it is used or not ready.")
    load_time_s: float | None
    address: str | None
    stop_reason: str | None
    parameters: dict[str, int] = Field(description="What was chosen where the model's entry says auto.")
    memory: dict[str, Held] = Field(description="By device.")
    progress: Progress | None = None


class InstanceOfModel(InstanceView):
    model: str


class ModelView(BaseModel):
    """One model with everything known of it; one that left the catalogue has its first fields only."""

    id: str
    status: Status
    state: State
    pinned: bool
    service: str | None = None
    aliases: list[str] = []
    description: str = ""
    priority: int | None = None
    idle_after_s: float | None = None
    footprint: Footprint | None = None
    problem: str | None = Field(None, description="Why it cannot be loaded at all.")
    held_for_s: float | None = Field(None, description="How long an unload still keeps it out.")
    failure: FailureView | None = None
    instance: InstanceView | None = None


class ForeignProcess(BaseModel):
    """One that is not ours. `container` is the id of the one it runs in, null outside of any."""

    pid: int
    name: str
    container: str | None
    container_name: str | None = Field(description="Null where the engine has not told it.")
    used_mib: int


class HolderView(BaseModel):
    holder: str
    state: State
    reserved_mib: int
    used_mib: int


class TelemetryView(BaseModel):
    """A GPU's readings, at most a few seconds old; null where the card does not tell."""

    utilization_percent: int | None = Field(description="Part of the last moment in which anything ran.")
    memory_utilization_percent: int | None = Field(description="The same of its memory's bus.")
    temperature_c: int | None
    power_w: float | None
    power_limit_w: float | None
    ecc_corrected: int | None = Field(description="Memory errors since the driver was loaded.")
    ecc_uncorrected: int | None
    throttled_by: list[str] = Field(
        description="Why its clocks are lower than they could be; empty if they are not."
    )


class IncidentView(BaseModel):
    """An error that the GPU's driver has reported."""

    at: float = Field(description="Seconds since 1970.")
    xid: int
    text: str


class DeviceView(BaseModel):
    """One device; `error` stands in place of the numbers where it cannot be measured."""

    id: str
    index: int | None
    name: str
    kind: DeviceKind
    capacity_mib: int
    headroom_mib: int
    telemetry: TelemetryView | None = Field(default=None, description="GPUs only.")
    incidents: list[IncidentView] | None = Field(default=None, description="GPUs only.")
    error: str | None = None
    free_mib: int | None = None
    used_mib: int | None = None
    reserved_mib: int | None = None
    kept_back_mib: int | None = None
    available_mib: int | None = None
    overcommitted_mib: int | None = Field(
        default=None, description="How much less is free than the headroom and what models were promised."
    )
    foreign_mib: int | None = None
    unexplained_mib: int | None = None
    attributed: bool | None = None
    foreign: list[ForeignProcess] = []
    holders: list[HolderView] = []


class DeviceList(BaseModel):
    devices: list[DeviceView]


class QueueEntry(BaseModel):
    model: str
    waiting: int
    for_s: float
    reason: str


class Millis(BaseModel):
    """The last one, and mean and largest of the last minute or two."""

    last: float
    mean: float
    max: float


class LoopView(BaseModel):
    """How the control loop itself is doing; `late` says why while it is."""

    turns: int
    inbox: int = Field(description="Events that wait for the next turn.")
    inbox_max: int
    turn_ms: Millis
    save_ms: Millis
    lag_ms: Millis = Field(description="How late the event loop wakes what it should.")
    phase: str
    phase_for_s: float
    tasks: int
    late: str | None


class StateView(BaseModel):
    """Everything, of one moment."""

    version: int
    sample_age_s: float
    devices: list[DeviceView]
    models: list[ModelView]
    instances: list[InstanceOfModel]
    leases: list[dict[str, Any]]
    queue: list[QueueEntry]
    loop: LoopView


class OperationView(BaseModel):
    """How a load, unload, download or removal is going; `phase` and `progress` while it runs."""

    id: str
    kind: OperationKind
    model: str
    state: OperationState
    message: str
    code: str | None
    created_at: float
    ended_at: float | None
    freed_mib: int
    phase: State | None = None
    progress: Progress | None = None


class Accepted(BaseModel):
    """What was accepted, or is done."""

    success: Literal[True]
    message: str
    operation: OperationView
    freed_mib: int | None = Field(None, description="What came back, once it has ended.")


class PlannedDevice(BaseModel):
    """One device: what the model takes there, and what is available before and after. `capacity_mib` is
    without the headroom; `error` stands in place of the numbers where it cannot be measured."""

    id: str
    index: int | None
    name: str
    kind: DeviceKind
    takes_mib: int
    available_mib: int | None = None
    overcommitted_mib: int | None = None
    available_after_mib: int | None = None
    capacity_mib: int | None = None
    error: str | None = None


class EvictionView(BaseModel):
    """Somebody who would leave. `why` says in words what chose it; `reload_cost` is its load time by how
    often a second it is used."""

    model: str
    frees_mib: dict[str, int]
    in_flight: int
    idle_s: float | None = Field(description="Null while it is busy: then it is drained.")
    priority: int
    load_time_s: float
    reload_cost: float
    why: str


class RefusalView(BaseModel):
    """The error that a load would be answered, with its details and its HTTP `status`."""

    model_config = ConfigDict(extra="allow")

    status: int
    code: str
    message: str


class FittingView(BaseModel):
    """What to change in the model's entry so that it would fit, and what it would need then."""

    context_size: int | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    n_gpu_layers: int | None = None
    needs_mib: int = Field(description="On the GPU; without one, in RAM.")
    gpu_mib: int
    host_mib: int


class PlanView(BaseModel):
    """What a load would do now. `refusal` and `would_fit` are there only where it would be refused."""

    model: str
    state: State
    outcome: Outcome
    message: str
    devices: list[PlannedDevice]
    parameters: dict[str, int] = Field(description="What would be chosen where the entry says auto.")
    footprint: Footprint
    evictions: list[EvictionView] = Field(description="In the order in which they are asked to leave.")
    waits_for: str | None
    refusal: RefusalView | None = None
    would_fit: list[FittingView] = []


class LogLine(BaseModel):
    id: int
    at: float
    kind: str
    text: str
    model: str | None
    attempt: str | None
    data: dict[str, Any]


class LogLines(BaseModel):
    """The newest of the event log, oldest first."""

    events: list[LogLine]


class Health(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    """`checks` by name: `ok`, or what is wrong."""

    ready: bool
    checks: dict[str, str]
    found: list[str]


class CheckView(BaseModel):
    name: str
    status: Literal["ok", "warning", "bad"]
    found: str
    advice: str


class Diagnosis(BaseModel):
    ok: bool
    version: str
    checks: list[CheckView]


class KeyView(BaseModel):
    """What is known of an API key; its text begins with `orc_` and the id."""

    name: str
    id: str
    scopes: list[Scope]
    created_at: float
    expires_at: float | None
    last_used_at: float | None = Field(description="Up to an hour late.")


class KeyList(BaseModel):
    keys: list[KeyView]


class NewKey(KeyView):
    key: str = Field(description="The key itself. It is told this once.")


class RevokedKey(KeyView):
    success: Literal[True]


class Props(BaseModel):
    """What llama.cpp clients ask of a router."""

    role: Literal["router"]
    models_autoload: bool
    build_info: str
    default_generation_settings: dict[str, Any]
    total_slots: int
    chat_template: str
