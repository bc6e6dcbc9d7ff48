"""Foreign use as people know it: a container is one holder, however many processes it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from orchestrator.core.entities import ContainerId, ForeignProcess, Sample
from orchestrator.core.events import ContainerNamed
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.verdicts import Holding

SHORT_ID = 12
"""Digits of a container's id, as `docker ps` shows them."""


def foreign_holdings(
    processes: Iterable[ForeignProcess], names: Mapping[ContainerId, str]
) -> tuple[Holding, ...]:
    """One for each container and for each process outside of any, the largest first."""
    groups: dict[ContainerId | int, list[ForeignProcess]] = {}
    for process in processes:
        groups.setdefault(process.container or process.pid, []).append(process)
    holdings = (holding(members, names) for members in groups.values())
    return tuple(sorted(holdings, key=lambda holding: -holding.held_bytes))


def holding(members: list[ForeignProcess], names: Mapping[ContainerId, str]) -> Holding:
    container = members[0].container
    held_bytes = sum(process.used_bytes for process in members)
    first = f"{members[0].name} (PID {members[0].pid})"
    if container is None:
        return Holding(first, held_bytes, "another program")
    inside = first if len(members) == 1 else f"{len(members)} processes"
    who = names.get(container) or f"{inside} in {container[:SHORT_ID]}"
    return Holding(who, held_bytes, "container, not ours")


def containers_in(sample: Sample) -> frozenset[ContainerId]:
    """The containers of all foreign processes."""
    readings = sample.readings.values()
    return frozenset(p.container for reading in readings for p in reading.foreign if p.container)


def container_named(state: Snapshot, event: ContainerNamed) -> Snapshot:
    """Kept while a foreign process of the container is shown."""
    names = {**state.container_names, event.container: event.name}
    return with_names_shown(replace(state, container_names=names))


def with_names_shown(state: Snapshot) -> Snapshot:
    """Without the names of containers that the sample does not show any more."""
    gone = state.container_names.keys() - containers_in(state.sample)
    if not gone:
        return state
    names = {container: name for container, name in state.container_names.items() if container not in gone}
    return replace(state, container_names=names)
