"""The settings: explicit arguments first, then `ORCHESTRATOR_<KEY>` variables, then orchestrator.yaml."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from orchestrator.catalogue.explain import explain
from orchestrator.catalogue.networks import Network, networks, proxies
from orchestrator.catalogue.schema import VOLUME
from orchestrator.catalogue.units import Duration, MaybeDuration, Whole, listed, suggestion
from orchestrator.catalogue.yaml_lines import Document, KeyPath, load_yaml
from orchestrator.core.errors import CatalogueError
from orchestrator.core.keys import Scope
from orchestrator.core.units import NEVER

PREFIX = "ORCHESTRATOR_"
DEFAULT_FILE = Path("orchestrator.yaml")
SHIPPED = Path(__file__).parent / "_shipped"

OTHER_VARIABLES = re.compile(r"ORCHESTRATOR_(URL|KEY|ATTEMPT|OWNER|MODEL|TEST_.+)")
"""Variables with our prefix that are no settings: the client's, the tests', the marks on what we start."""


def _services_folder() -> Path:
    beside = Path("services")
    if beside.is_dir():
        return beside.absolute()
    shipped = SHIPPED / "services"
    return shipped if shipped.is_dir() else Path(__file__).parent.parent / "services"


def _null(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in NEVER else value


MaybeWhole = Annotated[Whole | None, BeforeValidator(_null)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(listed)]
Texts = Annotated[tuple[str, ...], BeforeValidator(listed)]
Networks = Annotated[dict[Network, frozenset[Scope]], BeforeValidator(networks)]
Proxies = Annotated[tuple[str, ...], BeforeValidator(proxies)]


class Settings(BaseSettings):
    """Everything an operator may choose; durations are seconds, `*_mib` are MiB.

    Use `load_settings`, which says what is wrong by file, line and field; the bare constructor raises
    pydantic's ValidationError instead, and passes over names that are no settings. Paths are absolute:
    those of the file count from its folder, all others from the working directory.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=False)

    config: Path | None = Field(None, description="The file the other settings were read from.")
    host: str = Field("127.0.0.1", min_length=1, description="The address to listen on.")
    port: Whole = Field(8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one.")
    database: Path = Field(
        default_factory=lambda: Path("state/orchestrator.db").absolute(),
        description="The SQLite file; its folder is ours.",
    )
    services: Path = Field(default_factory=_services_folder, description="The folder of services.")
    models: Path = Field(
        default_factory=lambda: Path("models.yaml").absolute(),
        description="The catalogue; without it there are two demos.",
    )
    models_dir: Path | None = Field(None, description="A folder of GGUF files, each offered as a model.")
    engine: Literal["auto", "docker", "process"] = Field("auto", description="Who starts models.")
    devices: Literal["auto", "nvml", "host"] = Field("auto", description="Whose memory is managed.")
    headroom_mib: Whole = Field(512, ge=0, description="What stays free on each GPU.")
    host_memory_mib: MaybeWhole = Field(
        None,
        ge=1,
        description="RAM that models may have; by default 80 % of it (96 MiB for the demos alone).",
    )
    restore: Literal["pinned", "all", "none"] = Field("pinned", description="What to load after a reboot.")
    idle_after: MaybeDuration = Field(1800.0, description="Unload a model idle this long; or never.")
    priority: Whole = Field(
        50, ge=0, le=100, description="A model's default priority; higher is kept longer."
    )
    deadline: Duration = Field(300.0, gt=0, description="How long a request may wait for its model.")
    queue_limit: Whole = Field(64, ge=1, description="Requests that may wait for one model.")
    body_limit_mib: Whole = Field(64, ge=1, description="The largest request body.")
    spool_limit_mib: Whole = Field(1024, ge=1, description="All waiting request bodies together.")
    request_limit: Duration = Field(1800.0, gt=0, description="No request lasts longer.")
    docker_network: str = Field("orchestrator-models", min_length=1, description="The network of the models.")
    gpu_access: Literal["auto", "nvidia", "cdi", "devices", "none"] = Field(
        "auto", description="How containers get GPUs."
    )
    stop_containers_on_exit: bool = Field(False, description="Else containers outlive the orchestrator.")
    hub_volume: str | None = Field(
        None, description="The engine's volume that is mounted here at HF_HOME, if it is one."
    )
    mount_roots: Paths = Field((), description="Host folders that bind mounts may come from.")
    allowed_hosts: Texts = Field((), description="More names that a request's Host may have.")
    allow_remote: bool = Field(
        False, description="Ask other machines for no key while there are none, instead of making one."
    )
    trusted_networks: Networks = Field(
        default_factory=dict, description="Scopes that callers from these networks have without a key."
    )
    trusted_proxies: Proxies = Field(
        (), description="Whose X-Forwarded headers are believed: addresses, networks, or names."
    )
    event_retention: Whole = Field(10_000, ge=1, description="Rows kept of the event log.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")

    @property
    def state_dir(self) -> Path:
        """The folder of the database, where logs, demos and other state lie too."""
        return self.database.parent

    @property
    def is_reachable(self) -> bool:
        """Others than this machine's users can reach us; through a trusted proxy wherever we listen."""
        return not _is_loopback(self.host) or bool(self.trusted_proxies)

    @property
    def needs_keys(self) -> bool:
        """A key is asked for although there may be none."""
        return bool(self.trusted_networks) or (self.is_reachable and not self.allow_remote)

    @field_validator("database", "services", "models", "models_dir", "config", mode="after")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return _at_home(path).absolute() if path is not None else None

    @field_validator("hub_volume", mode="after")
    @classmethod
    def _volume(cls, name: str | None) -> str | None:
        if name and not VOLUME.fullmatch(name):
            raise ValueError("expected a volume's name: letters, digits and . _ -")
        return name or None

    @field_validator("mount_roots", mode="after")
    @classmethod
    def _rooted(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in paths:
            if not path.is_absolute() or path == Path("/"):
                raise ValueError("expected absolute folders, and never / itself")
        return paths

    @field_validator("log_level", "engine", "devices", "restore", "gpu_access", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        explicit = init_settings()
        variables = _Fixed(settings_cls, read_variables(os.environ))
        file = _Fixed(
            settings_cls, _file_values(find_file(explicit.get("config"), variables().get("config")))
        )
        return (init_settings, variables, file)


OF_THE_FILE = frozenset(Settings.model_fields) - {"config"}


def _at_home(path: Path) -> Path:
    """With `~` and `~user` filled in. Raises ValueError."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"there is no user whose folder is {path.parts[0]}, in {path}") from None


class _Fixed(PydanticBaseSettingsSource):
    """A source whose values are known already."""

    def __init__(self, settings_cls: type[BaseSettings], values: Mapping[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = dict(values)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def load_settings(config: Path | str | None = None, **explicit: Any) -> Settings:
    """The settings, with `explicit` ones first; those that are None count as not given.

    Raises CatalogueError naming file and line (or the variable), field, value and what is allowed.
    """
    given = {key: value for key, value in explicit.items() if value is not None}
    if config is not None:
        given["config"] = Path(config)
    errors = unknown_variables(os.environ)
    variables = read_variables(os.environ)
    try:
        document = find_file(given.get("config"), variables.get("config"))
    except CatalogueError as error:
        raise CatalogueError("\n".join([*errors, error.message])) from error
    errors += unknown_keys(document)
    try:
        settings = Settings(**given)
    except ValidationError as error:
        errors += explain(error, Settings, _Places(given, variables, document))
    if errors:
        raise CatalogueError("\n".join(errors))
    return settings


def find_file(*named: object) -> Document | None:
    """The settings file: the first that is named, else ./orchestrator.yaml if it is there."""
    chosen = next((Path(str(name)) for name in named if name), None)
    try:
        path = _at_home(chosen or DEFAULT_FILE).absolute()
    except ValueError as error:
        raise CatalogueError(f"config: {error}") from error
    if chosen is None and not path.is_file():
        return None
    return load_yaml(path)


def read_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings among the variables."""
    named = {key: PREFIX + key.upper() for key in Settings.model_fields}
    return {key: environment[name] for key, name in named.items() if name in environment}


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """An error for each variable with our prefix that is none of ours."""
    known = [PREFIX + key.upper() for key in Settings.model_fields]
    errors = []
    for name in environment:
        if name.startswith(PREFIX) and name not in known and not OTHER_VARIABLES.fullmatch(name):
            close = suggestion(name.removeprefix(PREFIX), Settings.model_fields)
            close = re.sub("'(.+)'", lambda key: f"'{PREFIX}{key[1].upper()}'", close)
            errors.append(
                f"the variable {name} is no setting{close or ';'} allowed: {', '.join(sorted(known))}"
            )
    return errors


def unknown_keys(document: Document | None) -> list[str]:
    """An error for each key of the file that is no setting."""
    data = document.data if document is not None else None
    if document is None or data is None:
        return []
    if not isinstance(data, dict):
        return [document.at((), "expected settings, one 'key: value' a line")]
    listing = f"allowed: {', '.join(sorted(OF_THE_FILE))}"
    return [
        document.at((key,), f"unknown setting{suggestion(key, OF_THE_FILE) or ';'} {listing}")
        for key in data
        if key not in OF_THE_FILE
    ]


def _file_values(document: Document | None) -> dict[str, Any]:
    """Settings as the file has them, its relative paths made absolute."""
    if document is None:
        return {}
    data = document.data if isinstance(document.data, dict) else {}
    values: dict[str, Any] = {key: value for key, value in data.items() if key in OF_THE_FILE}
    for key in ("database", "services", "models", "models_dir"):
        if isinstance(values.get(key), str):
            with contextlib.suppress(ValueError):  # which the field's own check tells
                values[key] = document.path.parent / _at_home(Path(values[key]))
    return {**values, "config": document.path}


class _Places:
    """Says where a setting's value came from: an argument, a variable, or a line of the file."""

    def __init__(
        self, given: Mapping[str, Any], variables: Mapping[str, str], document: Document | None
    ) -> None:
        self._given, self._variables, self._document = given, variables, document

    def __call__(self, where: KeyPath, text: str) -> str:
        key = str(where[0]) if where else ""
        if key in self._variables and key not in self._given:
            return f"the variable {PREFIX}{key.upper()}: {text}"
        data = self._document.data if self._document is not None else None
        if self._document is not None and isinstance(data, dict) and key in data and key not in self._given:
            return self._document.at(where, text)
        return f"setting {key}: {text}" if key else text


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
