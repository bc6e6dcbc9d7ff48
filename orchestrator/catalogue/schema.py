"""The closed schema of service.yaml and models.yaml. What is not named here does not exist."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from orchestrator.catalogue.placeholders import check
from orchestrator.catalogue.units import Duration, MaybeDuration, Size, Whole, listed

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]

ALL_LAYERS = 999
AUTO = -1
"""In place of a context size or a number of layers: it is chosen when the model is placed."""

MOST_GPUS = 16
READ_ONLY = ":ro"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(?:/[A-Za-z0-9][A-Za-z0-9._:-]*)*")
_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]+")
_HOSTNAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)
_DEVICE = re.compile(r"host|(?:GPU|MIG)-[A-Za-z0-9/-]+")
_ENGINES_OWN = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES")


_HTTP_PATH = r"^/[\x21-\x7e]*$"
_REPOSITORY = r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$"
FORMS = {
    _HTTP_PATH: "a path that begins with /, such as /health, without blanks",
    _REPOSITORY: "OWNER/NAME, as the hub calls it, such as Qwen/Qwen3-0.6B-GGUF",
}
"""What a text that must match one of these patterns is called."""


def check_name(text: str) -> str:
    """A model's name or alias. Raises ValueError."""
    if len(text) > 128 or not _NAME.fullmatch(text):
        raise ValueError(
            "expected a name of letters, digits and . _ - : / that begins with a letter or digit "
            "(also after each /), at most 128 long"
        )
    return text


def _container(text: str) -> str:
    if not _CONTAINER.fullmatch(text):
        raise ValueError("expected a container name: letters, digits and . _ -, at most 63 long")
    return text


def _hostname(text: str) -> str:
    name = text.lower()
    if not _HOSTNAME.fullmatch(name) or name.rpartition(".")[2].isdigit():
        raise ValueError("expected a host's name, such as llama.lan, without a port")
    return name


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise ValueError("expected a GPU by its UUID, such as GPU-8f3a…, or host")
    return text


def _plain_path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("expected a path")
    return text


def _value(value: object) -> object:
    """A variable's value: text; whole numbers and truth values as they are written in YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise ValueError("expected text: put it in quotes")
    if "\0" in value:
        raise ValueError("expected text without NUL")
    return value


def _variables(values: dict[str, str]) -> dict[str, str]:
    for key in values:
        if not _VARIABLE.fullmatch(key):
            raise ValueError(f"'{key}' cannot be the name of a variable")
        if key in _ENGINES_OWN or key.startswith("ORCHESTRATOR_"):
            raise ValueError(f"'{key}' is set by the orchestrator, which chooses the device")
    return values


def _gpus(value: object) -> object:
    wanted = "expected a number of GPUs from 0 to 16, auto, or a list of GPU UUIDs"
    if isinstance(value, bool) or not isinstance(value, int | str | list | tuple):
        raise ValueError(wanted)
    if isinstance(value, int) and not 0 <= value <= MOST_GPUS:
        raise ValueError(wanted)
    if isinstance(value, str) and value != "auto":
        raise ValueError(wanted)
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(item, str) for item in value) or len(set(value)) < len(value):
            raise ValueError(wanted)
        return tuple(_device(item) for item in value)
    return value


def _layers(value: object) -> object:
    return ALL_LAYERS if value == "all" else value


def _auto_or(value: object, read: ValidatorFunctionWrapHandler) -> object:
    if isinstance(value, str) and value != "all" and not re.fullmatch(r"auto|[+-]?\d+", value.strip()):
        raise ValueError("expected a whole number, or auto")
    return AUTO if value == "auto" else read(value)


Name = Annotated[str, AfterValidator(check_name)]
PathText = Annotated[str, AfterValidator(_plain_path)]
Filled = Annotated[str, BeforeValidator(_value), AfterValidator(check)]
Variables = Annotated[dict[str, Filled], AfterValidator(_variables)]
Command = Annotated[tuple[Filled, ...], Field(min_length=1)]
Gpus = Annotated[
    int | Literal["auto"] | tuple[str, ...],
    BeforeValidator(_gpus),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": MOST_GPUS},
                {"const": "auto"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
            ]
        }
    ),
]
Layers = Annotated[
    Whole,
    BeforeValidator(_layers),
    Field(ge=0),
    WrapValidator(_auto_or),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"enum": ["all", "auto"]}]}),
]
Context = Annotated[
    Whole,
    Field(ge=1, le=2**31 - 1),
    WrapValidator(_auto_or),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 2**31 - 1}, {"const": "auto"}]}),
]


class Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Health(Closed):
    """How a start is watched: a path that answers 200 once the service is ready."""

    path: str = Field("/health", pattern=_HTTP_PATH)
    start_timeout: Duration = Field(600.0, gt=0)


class ServiceEntry(Closed):
    """services/<name>/service.yaml: a kind of container or process."""

    image: str | None = Field(None, min_length=1, description="What the docker engine starts.")
    command: Command | None = Field(
        None, description="What the process engine starts; python is the orchestrator's own interpreter."
    )
    container_command: Command | None = Field(None, description="In place of the image's own command.")
    port: Whole = Field(8000, ge=1, le=65535, description="Where it listens inside its container.")
    health: Health = Field(default_factory=Health)
    environment: Variables = Field(default_factory=dict, description="For processes and containers.")
    container_environment: Variables = Field(
        default_factory=dict, description="For containers, over the others."
    )
    volumes: dict[str, str] = Field(
        default_factory=dict,
        description="A named volume, or a host path under mount_roots, to a path inside; with :ro read-only.",
    )
    api: Literal["openai", "http"] = Field("openai", description="http is reached through /upstream only.")
    hostname: Annotated[str, AfterValidator(_hostname)] | None = Field(
        None, description="A name of this server at which there is only this service's OpenAI API."
    )
    memory: Literal["gguf", "declared"] = Field("declared", description="How a footprint is known.")
    stop_grace: Duration = Field(10.0, description="From SIGTERM to SIGKILL.")
    shm_size: Size | None = Field(None, description="/dev/shm of the container.")
    description: str = ""

    @field_validator("volumes")
    @classmethod
    def _volumes(cls, volumes: dict[str, str]) -> dict[str, str]:
        for source, text in volumes.items():
            target = text.removesuffix(READ_ONLY)
            if not source.startswith("/") and not VOLUME.fullmatch(source):
                raise ValueError(f"'{source}' is neither a volume's name nor an absolute path")
            if not re.fullmatch(r"(/[A-Za-z0-9._@+-]+)+/?", target) or "/../" in target + "/":
                raise ValueError(
                    f"'{text}' is no absolute path inside the container (which may end in {READ_ONLY})"
                )
            if target.split("/")[1] in ("proc", "sys", "dev"):
                raise ValueError(f"nothing may be mounted over '{target}'")
        return volumes

    @model_validator(mode="after")
    def _startable(self) -> ServiceEntry:
        if self.image is None and self.command is None:
            raise ValueError("a service needs an image (docker engine), a command (process engine), or both")
        if self.hostname is not None and self.api != "openai":
            raise ValueError("a hostname stands for a service's OpenAI API, and this one has api: http")
        return self

    def targets(self) -> dict[str, str]:
        """Where each volume is inside, without what is said of it."""
        return {source: text.removesuffix(READ_ONLY) for source, text in self.volumes.items()}

    def read_only(self) -> frozenset[str]:
        return frozenset(source for source, text in self.volumes.items() if text.endswith(READ_ONLY))

    def texts(self) -> tuple[str, ...]:
        """Everything in it that may hold placeholders."""
        commands = (self.command or ()) + (self.container_command or ())
        return (*commands, *self.environment.values(), *self.container_environment.values())


class Source(Closed):
    """Where a model's file comes from: the Hugging Face cache, or a demo made from a seed."""

    repo: str | None = Field(None, pattern=_REPOSITORY)
    file: PathText | None = None
    mmproj: PathText | None = None
    demo: Whole | None = Field(None, ge=0, le=2**32 - 1)

    @model_validator(mode="after")
    def _either(self) -> Source:
        if (self.demo is None) == (self.repo is None):
            raise ValueError("expected either repo and file, or demo")
        if (self.repo is None) != (self.file is None) or (self.mmproj and not self.repo):
            raise ValueError("expected repo and file together; mmproj only beside them")
        return self


class ModelEntry(Closed):
    """A model of models.yaml. A bare text in its place is the path of a GGUF file for llama-cpp."""

    service: str = Field(min_length=1, description="The folder's name in services.")
    description: str = ""
    path: PathText | None = Field(None, description="The model's file on this machine.")
    mmproj: PathText | None = Field(None, description="The projector's file on this machine.")
    source: Source | None = None
    memory: Size | None = Field(None, description="What it takes on the GPU; without a GPU, in RAM.")
    host_memory: Size | None = Field(None, description="RAM besides the GPU.")
    context_size: Context = 8192
    n_gpu_layers: Layers = ALL_LAYERS
    parallel: Whole = Field(4, ge=1, le=256)
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    gpus: Gpus = Field(1, description="How many GPUs it is split over, auto, or exactly which; 0 is RAM.")
    idle_after: MaybeDuration = Field(
        None, description="Unload when idle so long, or never; as in the settings."
    )
    priority: Whole | None = Field(None, ge=0, le=100)
    pinned: bool = False
    deadline: Duration | None = Field(None, gt=0)
    queue_limit: Whole | None = Field(None, ge=1)
    start_timeout: Duration | None = Field(None, gt=0)
    drain_limit: Duration = 600.0
    aliases: Annotated[tuple[Name, ...], BeforeValidator(listed)] = ()
    served_name: str | None = Field(None, min_length=1, description="What the container itself calls it.")
    container_name: Annotated[str, AfterValidator(_container)] | None = None
    environment: Variables = Field(default_factory=dict, description="Added to the service's.")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"service": "llama-cpp", "path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_place(self) -> ModelEntry:
        if self.path is not None and self.source is not None:
            raise ValueError("expected path or source, not both")
        if self.mmproj is not None and self.path is None:
            raise ValueError("expected mmproj beside path; with a source it stands inside that")
        return self

    @property
    def is_auto(self) -> bool:
        return AUTO in (self.context_size, self.n_gpu_layers)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core))
        return {"title": "Model", "anyOf": [{"type": "string", "description": "A GGUF file."}, schema]}


class ModelsFile(Closed):
    """models.yaml."""

    models: dict[Name, ModelEntry] = Field(default_factory=dict)


def json_schemas() -> dict[str, dict[str, Any]]:
    """JSON schemas for editors, by file name."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {
        "service.yaml": {**draft, **ServiceEntry.model_json_schema()},
        "models.yaml": {**draft, **ModelsFile.model_json_schema()},
    }
