"""services/*/service.yaml and models.yaml into the models that the planner and the engines know."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from orchestrator.catalogue import files
from orchestrator.catalogue.explain import explain
from orchestrator.catalogue.gguf import Gguf
from orchestrator.catalogue.launch import launch_of
from orchestrator.catalogue.placeholders import used
from orchestrator.catalogue.recipes import recipe_of
from orchestrator.catalogue.schema import ModelEntry, ModelsFile, ServiceEntry, Source, check_name
from orchestrator.catalogue.services import read_services
from orchestrator.catalogue.splitting import gpus_of, unsaid_splits
from orchestrator.catalogue.units import suggestion
from orchestrator.catalogue.variants import auto_refused, filled, told_to, tunable
from orchestrator.catalogue.volumes import hub_target
from orchestrator.catalogue.yaml_lines import Document, KeyPath, load_yaml, shown
from orchestrator.core.entities import MIB, Demand, Device, Model, ModelId, Variant
from orchestrator.core.errors import CatalogueError, UnknownModel
from orchestrator.core.mistakes import quoted
from orchestrator.estimate.gguf_header import GgufError, Header, read_gguf
from orchestrator.estimate.plan import Plan
from orchestrator.hub.names import is_later_shard, stem
from orchestrator.settings import Settings

DEMO_BYTES = 64 * MIB
DEMO_SEEDS = {"demo": 7, "demo-2": 8}
GGUF_SERVICE = "llama-cpp"
PROMPT_CACHE = "CACHE_RAM_MIB"
"""The variable by which a GGUF service is given a prompt cache; its RAM is counted."""

Place = Callable[[KeyPath, str], str]


@dataclass(frozen=True)
class Catalogue:
    """All models by name. `problems` are sentences for people, of models that are listed but cannot be
    loaded and of what was passed over; `demos` are the files that `ensure_demos` makes, with their seeds.
    `ggufs` are the models whose footprint their file tells; `hostnames` has the services by hostname;
    `files` are those of each model that were found, `sources` say which models come from the hub.
    `read_from` has models.yaml and `models_dir`, as far as they were there."""

    models: Mapping[ModelId, Model] = field(default_factory=dict)
    services: Mapping[str, ServiceEntry] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    only_demos: bool = False
    demos: Mapping[Path, int] = field(default_factory=dict)
    ggufs: Mapping[ModelId, Gguf] = field(default_factory=dict)
    hostnames: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[ModelId, tuple[Path, ...]] = field(default_factory=dict)
    sources: Mapping[ModelId, Source] = field(default_factory=dict)
    read_from: frozenset[Path] = frozenset()

    def resolve(self, name: str) -> Model:
        """The model of this name or alias. Raises UnknownModel."""
        found = self.models.get(name)
        if found is None:
            found = next((model for model in self.models.values() if name in model.aliases), None)
        if found is None:
            raise UnknownModel(name, tuple(self.models))
        return found


def read_catalogue(
    settings: Settings,
    *,
    on_gpu: bool | None = None,
    gpus: Sequence[Device] = (),
    before: Catalogue | None = None,
) -> Catalogue:
    """Read all files named by the settings. Nothing is written, and nothing of an earlier reading kept.

    `on_gpu` says whether models will run on a GPU, which an estimate depends on; by default they do
    unless the settings say `devices: host`. `gpus` are those they may go to, in index order, where they
    are known: CUDA takes more on some. A models.yaml or `models_dir` that was there `before` must be there
    again: a lost file ends no models. Raises CatalogueError with one line for each thing that is wrong;
    files of models that are missing or broken are no error but the `problem` of their model.
    """
    errors: list[str] = []
    problems: list[str] = []
    services, broken = read_services(settings, errors, problems)
    there = _read_from(settings)
    lost = before.read_from - there if before is not None else frozenset()
    has_file = {settings.models} <= there | lost or "models" in settings.model_fields_set
    has_file = has_file or settings.models.is_symlink()  # to a disk that is not there, maybe
    entries = list(_entries(settings, errors) if has_file else _demos())
    if settings.models_dir in lost:
        errors.append(f"{shown(settings.models_dir)}: there is no such folder of models any more")
    _check_names(entries, errors)
    taken = {name for entry in entries for name in entry.names()}
    entries += _from_folder(settings, services, taken, problems)
    builder = _Builder(settings, services, settings.devices != "host" if on_gpu is None else on_gpu, gpus)
    sound = [e for e in entries if broken is not None and e.entry.service not in broken]
    models = builder.models(sound, errors)  # of the others the service's own error is told, and enough
    if errors:
        raise CatalogueError("\n".join(errors))
    problems += [f"{model.id}: {model.problem}" for model in models.values() if model.problem]
    problems += unsaid_splits({entry.name: entry.entry for entry in entries}, services)
    demos = [entry for entry in entries if entry.is_demo]
    return Catalogue(
        models=models,
        services=services,
        problems=tuple(problems),
        only_demos=bool(demos) and len(demos) == len(entries),
        demos={_demo_path(settings, entry.seed): entry.seed for entry in demos},
        ggufs=builder.ggufs,
        hostnames={entry.hostname: name for name, entry in services.items() if entry.hostname},
        files=builder.files,
        sources=_of_the_hub(entries),
        read_from=there,
    )


def _read_from(settings: Settings) -> frozenset[Path]:
    paths = (settings.models, settings.models_dir)
    return frozenset(path for path in paths if path is not None and files.is_there(path))


def _of_the_hub(entries: Iterable[_Entry]) -> dict[ModelId, Source]:
    sources = ((entry.name, entry.entry.source) for entry in entries)
    return {name: source for name, source in sources if source is not None and source.repo}


def build_models(
    settings: Settings,
    services: Mapping[str, ServiceEntry],
    entries: Mapping[ModelId, ModelEntry],
    *,
    on_gpu: bool,
    gpus: Sequence[Device] = (),
) -> tuple[dict[ModelId, Model], Mapping[ModelId, tuple[Path, ...]], Mapping[ModelId, Gguf]]:
    """Models of entries that stand in no file, their files and what those tell. Raises CatalogueError."""
    builder = _Builder(settings, services, on_gpu, gpus)
    built = {name: builder.model(_Entry(name, entry, _in_no_file)) for name, entry in entries.items()}
    return built, builder.files, builder.ggufs


def _in_no_file(where: KeyPath, text: str) -> str:
    return f"{'.'.join(map(str, where))}: {text}"


def host_budget_bytes(settings: Settings, catalogue: Catalogue, ram_bytes: int) -> tuple[int, str]:
    """The RAM that models may have together, and the sentence that says why it is that much."""
    if settings.host_memory_mib is not None:
        return settings.host_memory_mib * MIB, f"host_memory_mib is set to {settings.host_memory_mib}"
    if catalogue.only_demos:
        return 96 * MIB, (
            "the catalogue has only demo models of 64 MiB each, so it is kept to 96 MiB: room for one, "
            "which lets you see eviction; with a model of yours it becomes 80 % of the RAM"
        )
    return ram_bytes * 8 // 10, f"80 % of {ram_bytes / 2**30:.1f} GiB of RAM"


@dataclass(frozen=True)
class _Entry:
    """A model as it is written, and how to say where."""

    name: str
    entry: ModelEntry
    at: Place

    def names(self) -> tuple[str, ...]:
        return (self.name, *self.entry.aliases)

    @property
    def seed(self) -> int:
        return (self.entry.source.demo or 0) if self.entry.source else 0

    @property
    def is_demo(self) -> bool:
        return self.entry.source is not None and self.entry.source.demo is not None


# --- reading files


def _demos() -> Iterator[_Entry]:
    for name, seed in DEMO_SEEDS.items():
        entry = ModelEntry(
            service=GGUF_SERVICE,
            source=Source(demo=seed),
            description="A salad of random words, from real llama.cpp.",
        )
        yield _Entry(name, entry, _in_no_file)


def _entries(settings: Settings, errors: list[str]) -> Iterator[_Entry]:
    if not files.is_there(settings.models):
        errors.append(f"{shown(settings.models)}: there is no such file of models")
        return
    try:
        yield from _written(load_yaml(settings.models), errors)
    except CatalogueError as error:
        errors.append(error.message)


def _written(document: Document, errors: list[str]) -> Iterator[_Entry]:
    """What an editor has emptied, to write it anew, is no wish to end all models: `{}` must be written."""
    data = document.data if document.data is not None else {}
    found = data.get("models") if isinstance(data, dict) else None
    entries = found if isinstance(found, dict) else {}
    try:  # the frame first, then each entry by itself: one that is wrong hides no other
        frame = {**data, "models": {}} if isinstance(data, dict) and (entries or found is None) else data
        ModelsFile.model_validate(frame)
        if found is None:
            lacking = "nothing stands below it" if data else "the file is empty"
            errors.append(document.at(("models",), f"{lacking}; write 'models: {{}}' if no model is meant"))
    except ValidationError as error:
        errors += explain(error, ModelsFile, document.at)
    for name, value in entries.items():
        where = ("models", name)
        try:
            check_name(name)
        except ValueError as error:
            errors.append(document.at(where, f"got {quoted(name)}, {error}"))
        try:
            yield _Entry(name, ModelEntry.model_validate(value), document.at)
        except ValidationError as error:
            errors += explain(error, ModelEntry, document.at, where)


def _check_names(entries: Iterable[_Entry], errors: list[str]) -> None:
    """Every name and alias stands for one model, every container name for one container."""
    entries = list(entries)
    owners = {entry.name: entry.name for entry in entries}
    containers: dict[str, str] = {}
    for entry in entries:
        for place, alias in enumerate(entry.entry.aliases):
            if alias in owners:
                text = f"'{alias}' is already a name of '{owners[alias]}'"
                errors.append(entry.at(("models", entry.name, "aliases", place), text))
            owners.setdefault(alias, entry.name)
        container = entry.entry.container_name
        if container and containers.setdefault(container, entry.name) != entry.name:
            text = f"'{container}' is already that of '{containers[container]}'"
            errors.append(entry.at(("models", entry.name, "container_name"), text))


def _from_folder(
    settings: Settings, services: Mapping[str, ServiceEntry], taken: set[str], problems: list[str]
) -> Iterator[_Entry]:
    """A model for each GGUF in `models_dir`; what models.yaml names already is passed over silently."""
    folder = settings.models_dir
    if folder is None:
        return
    if not folder.is_dir() or GGUF_SERVICE not in services:
        lacking = f"service '{GGUF_SERVICE}'" if folder.is_dir() else f"folder {folder}"
        problems.append(f"models_dir offers nothing: there is no {lacking}.")
        return
    seen: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        name = re.sub(r"[^A-Za-z0-9._:-]+", "-", stem(file)).strip("-._:")[:128]
        if file.suffix.lower() != ".gguf" or "mmproj" in file.name.lower() or is_later_shard(file.name):
            continue
        if not name or name in seen:
            other = f"{seen[name]} has that name" if name else "its name has no letter"
            problems.append(f"{file} is not offered: {other}.")
        elif name not in taken:
            seen[name] = file
            entry = ModelEntry(service=GGUF_SERVICE, path=str(file))
            yield _Entry(name, entry, _in_no_file)


def _demo_path(settings: Settings, seed: int) -> Path:
    return settings.state_dir / "demo" / f"demo-{seed}.gguf"


# --- building models


@dataclass(frozen=True)
class _Files:
    """A model's files, their headers where they are GGUFs, and what is wrong with them."""

    found: files.Found = field(default_factory=files.Found)
    inside: files.Inside = field(default_factory=files.Inside)
    headers: tuple[Header, ...] = ()
    problem: str | None = None


class _Builder:
    """Makes a core Model of an entry; raises CatalogueError for what is written wrong."""

    def __init__(
        self,
        settings: Settings,
        services: Mapping[str, ServiceEntry],
        on_gpu: bool,
        gpus: Sequence[Device],
    ) -> None:
        self._settings = settings
        self._services = services
        self._on_gpu = on_gpu
        self._gpus = gpus
        self.ggufs: dict[ModelId, Gguf] = {}
        self.files: dict[ModelId, tuple[Path, ...]] = {}

    def models(self, entries: Iterable[_Entry], errors: list[str]) -> dict[ModelId, Model]:
        found = {}
        for entry in entries:
            try:
                found[entry.name] = self.model(entry)
            except CatalogueError as error:
                errors.append(error.message)
        return found

    def model(self, named: _Entry) -> Model:
        entry, settings = named.entry, self._settings
        service = self._service_of(named)
        found = self._files(named, service)
        self.files[named.name] = found.found.all()
        variants, problem = self._variants(named, service, found)
        least = variants[-1]
        start_timeout = entry.start_timeout or service.health.start_timeout
        devices, counts = gpus_of(entry)
        return Model(
            id=named.name,
            demand=least.demand,
            launch=least.launch,
            api=service.api,
            aliases=entry.aliases,
            served_name=entry.served_name,
            gpu_counts=counts,
            devices=devices,
            priority=settings.priority if entry.priority is None else entry.priority,
            pinned=entry.pinned,
            idle_after_s=entry.idle_after if "idle_after" in entry.model_fields_set else settings.idle_after,
            deadline_s=entry.deadline or max(settings.deadline, start_timeout),
            start_timeout_s=start_timeout,
            stop_grace_s=service.stop_grace,
            drain_limit_s=entry.drain_limit,
            queue_limit=entry.queue_limit or settings.queue_limit,
            problem=problem,
            description=entry.description or service.description,
            recipe=least.recipe,
            variants=variants if least.parameters else (),
            tunable=tunable(entry, service, is_demo=named.is_demo),
        )

    def _variants(
        self, named: _Entry, service: ServiceEntry, found: _Files
    ) -> tuple[tuple[Variant, ...], str | None]:
        """The ways to run it, the largest first, and the model's problem if it has one."""
        header = found.headers[0] if found.headers else None
        problem, made, told = None, [], told_to(named.entry, service)
        for parameters, entry in filled(named.entry, header, on_gpu=self._is_on_gpu(named.entry)):
            plan = self._plan(entry, service)
            demand, problem = self._demand(entry, plan, found, named, told)
            hub_volume = self._settings.hub_volume
            launch = launch_of(named.name, entry, service, found.found, found.inside, hub_volume)
            recipe = recipe_of(entry, service, found.found.all(), plan)
            made.append(Variant(parameters, demand, launch, recipe))
        return tuple(made), problem

    def _is_on_gpu(self, entry: ModelEntry) -> bool:
        return self._on_gpu and entry.gpus != 0

    def _plan(self, entry: ModelEntry, service: ServiceEntry) -> Plan:
        devices, _ = gpus_of(entry)
        card = next((gpu.name for gpu in self._gpus if not devices or gpu.id in devices), None)
        return _plan(
            entry, {**service.environment, **entry.environment}, on_gpu=self._is_on_gpu(entry), gpu=card
        )

    def _service_of(self, named: _Entry) -> ServiceEntry:
        name = named.entry.service
        service = self._services.get(name)
        if service is None:
            known = ", ".join(self._services) or "none"
            text = f"there is no service '{name}'{suggestion(name, self._services) or ';'} there are: {known}"
            raise CatalogueError(named.at(("models", named.name, "service"), text))
        needs_file = service.memory == "gguf" or "path" in used(service.texts())
        if needs_file and named.entry.path is None and named.entry.source is None:
            text = f"the service '{name}' needs a file: give path, or source with repo and file"
            raise CatalogueError(named.at(("models", named.name), text))
        refused = auto_refused(named.entry, service, is_demo=named.is_demo)
        if refused:
            raise CatalogueError(named.at(("models", named.name, refused[0]), refused[1]))
        return service

    def _files(self, named: _Entry, service: ServiceEntry) -> _Files:
        try:
            found = self._find(named)
            if named.is_demo and not _exists(found.path):
                lacking = importlib.util.find_spec("gguf") is None
                problem = "The demo model cannot be made: install the extra 'local'." if lacking else None
                return _Files(found, files.inside(found), problem=problem)
            target = hub_target(service, self._settings.hub_volume)
            headers: tuple[Header, ...] = ()
            if service.memory == "gguf":
                headers = tuple(read_gguf(file) for file in found.all())
            for file in found.all():
                if not _exists(file):
                    raise files.NotFound(f"There is no file {file}. Put it there, or correct the catalogue")
            return _Files(found, files.inside(found, target), headers)
        except files.NotFound as error:
            return _Files(problem=f"{error}.")
        except GgufError as error:
            return _Files(problem=f"{error} {_remedy(named)}")

    def _find(self, named: _Entry) -> files.Found:
        entry, source = named.entry, named.entry.source
        if named.is_demo:
            return files.Found(_demo_path(self._settings, named.seed))
        if source is not None and source.repo and source.file:
            pull = f"orchestrator pull {named.name}"
            return files.find_in_hub(source.repo, source.file, source.mmproj, pull)
        return files.Found(self._local(entry.path), self._local(entry.mmproj))

    def _local(self, text: str | None) -> Path | None:
        """A path as written: relative ones count from the folder of models.yaml. Raises NotFound."""
        return files.latest(self._settings.models.parent / files.at_home(Path(text))) if text else None

    def _demand(
        self, entry: ModelEntry, plan: Plan, found: _Files, named: _Entry, told: frozenset[str]
    ) -> tuple[Demand, str | None]:
        """What it needs, and the model's problem if it has one."""
        gguf = None
        if found.headers and found.found.path:
            _, counts = gpus_of(entry)
            here = counts[: len(self._gpus) or None] if len(counts) > 1 else ()
            gguf = Gguf(found.found.path, found.found.mmproj, plan, told, here, entry.host_memory)
            self.ggufs[named.name] = gguf
        host = entry.host_memory or 0
        memory = entry.memory if entry.memory is not None else (DEMO_BYTES if named.is_demo else None)
        if memory is not None:
            if entry.gpus == 0:
                return Demand(0, memory + host), found.problem
            return Demand(memory, host), found.problem
        if gguf is None:
            declare = f"Nothing can predict its footprint: declare memory: for '{named.name}', such as 12GiB."
            return Demand(0, source="unknown"), found.problem or declare
        return gguf.demand(plan, *found.headers[:2]), found.problem


def _exists(path: Path | None) -> bool:
    try:
        return path is not None and path.exists()
    except OSError:
        return False


def _remedy(named: _Entry) -> str:
    if named.is_demo:
        return "Delete it; it is made again at the next start."
    source = named.entry.source
    if source is not None:
        return f"Download it again: hf download {source.repo} --force-download --include '{source.file}'"
    return "Put the whole file there, or correct its path in the catalogue."


def _plan(entry: ModelEntry, environment: Mapping[str, str], *, on_gpu: bool, gpu: str | None) -> Plan:
    """As the service will be told to run it. Over several GPUs it is split evenly."""
    _, counts = gpus_of(entry)
    return Plan(
        context_size=entry.context_size,
        n_gpu_layers=entry.n_gpu_layers,
        parallel=entry.parallel,
        cache_type_k=entry.cache_type_k,
        cache_type_v=entry.cache_type_v,
        prompt_cache_bytes=_prompt_cache_bytes(environment),
        split=(1.0,) * counts[0],
        on_gpu=on_gpu,
        gpu=gpu,
    )


def _prompt_cache_bytes(environment: Mapping[str, str]) -> int:
    text = environment.get(PROMPT_CACHE, "0").strip()
    return int(text) * MIB if text.isdecimal() and len(text) < 10 else 0
