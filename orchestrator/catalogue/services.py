"""services/*/service.yaml: the kinds of service there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from orchestrator.catalogue.explain import explain
from orchestrator.catalogue.schema import ServiceEntry
from orchestrator.catalogue.yaml_lines import load_yaml, shown
from orchestrator.core.errors import CatalogueError
from orchestrator.settings import Settings


def read_services(
    settings: Settings, errors: list[str], problems: list[str]
) -> tuple[dict[str, ServiceEntry], frozenset[str] | None]:
    """All services by name, and the names of those that are written wrong: None if none could be read.

    What is wrong goes to `errors`, what is passed over to `problems`.
    """
    if not settings.services.is_dir():
        errors.append(f"{shown(settings.services)}: there is no such folder of services")
        return {}, None
    found: dict[str, ServiceEntry] = {}
    broken = set()
    for folder in sorted(entry for entry in settings.services.iterdir() if entry.is_dir()):
        file = folder / "service.yaml"
        if not file.is_file():
            problems.append(f"{shown(folder)} has no service.yaml and is passed over.")
            continue
        try:
            found[folder.name] = _service(file, settings, found)
        except CatalogueError as error:
            errors.append(error.message)
            broken.add(folder.name)
    return found, frozenset(broken)


def _service(file: Path, settings: Settings, others: Mapping[str, ServiceEntry]) -> ServiceEntry:
    document = load_yaml(file)
    try:
        service = ServiceEntry.model_validate(document.data if document.data is not None else {})
    except ValidationError as error:
        raise CatalogueError("\n".join(explain(error, ServiceEntry, document.at))) from error
    for source in service.volumes:
        refusal = _bind_refused(source, settings) if source.startswith("/") else None
        if refusal:
            raise CatalogueError(document.at(("volumes", source), refusal))
    for name, other in others.items():
        if service.hostname is not None and service.hostname == other.hostname:
            text = f"'{service.hostname}' is already the hostname of '{name}'"
            raise CatalogueError(document.at(("hostname",), text))
    return service


def _bind_refused(source: str, settings: Settings) -> str | None:
    real = Path(source).resolve()
    sockets = [Path(path).resolve() for path in ("/var/run/docker.sock", "/run/docker.sock")]
    if real.name.endswith(".sock") or any(socket.is_relative_to(real) for socket in sockets):
        return "an engine's socket is never given to a container"
    if any(real.is_relative_to(root.resolve()) for root in settings.mount_roots):
        return None
    roots = ", ".join(str(root) for root in settings.mount_roots)
    return f"host folders may come only from under mount_roots, which has {roots or 'nothing in it'}"
