"""What earlier loads showed of a model's GPU memory, and what that says about the next one.

Bytes here are of one GPU: of the one that held most where a model is split. RAM is not learned: of mapped
weights the kernel counts nothing as a process's, so what was measured there says too little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, field, replace

from orchestrator.core.buffers import Buffers
from orchestrator.core.entities import MIB, AttemptId, Model, ModelId, Recipe

KEPT_LOADS = 5
FAR = 0.25
"""A load that is further off than this part of what was predicted is believed once it is seen twice."""

SAME = 0.05
HAD_A_PROMPT = 0.5
WORTH_KEEPING_BYTES = MIB
OOM_STEP_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class Load:
    """One attempt: what it held when it was ready, and the most until now. `at` is seconds since 1970.

    `buffers` is what its log says of them; empty where that says nothing.
    """

    attempt: AttemptId
    ready_bytes: int
    peak_bytes: int
    at: float
    buffers: Buffers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Learned:
    """The newest loads of one recipe on one kind of card, oldest first.

    `predicted_bytes` is what was predicted at the newest. `floor_bytes` is at least needed, since a start
    with less ran out of memory; the next load that gets ready clears it.
    """

    recipe: Recipe
    card: str
    predicted_bytes: int
    loads: tuple[Load, ...] = ()
    floor_bytes: int = 0

    @property
    def key(self) -> str:
        return key_of(self.recipe, self.card)

    @property
    def at(self) -> float:
        """When it last changed; 0 if nothing was measured yet."""
        return max((load.at for load in self.loads), default=0.0)

    def believed(self) -> list[Load]:
        """Loads that are near the prediction, or like another one."""
        return [load for load in self.loads if self._is_near(load) or self._is_seen_again(load)]

    def measured_bytes(self, first_prompt_bytes: int) -> int | None:
        """What the next load will take, or None where nothing is believed yet.

        `first_prompt_bytes` is what a first long prompt is predicted to add. It counts until a load has grown
        by half of it at least: that one had its prompt, and what it added is known.
        """
        believed = self.believed()
        if not believed:
            return None
        grown = max(load.peak_bytes - load.ready_bytes for load in believed)
        added = grown if grown >= HAD_A_PROMPT * first_prompt_bytes else first_prompt_bytes
        return max(believed[-1].ready_bytes + added, *(load.peak_bytes for load in believed))

    def buffers(self) -> Buffers:
        """As the log of the newest load that counts has them."""
        return next((load.buffers for load in reversed(self.believed()) if load.buffers), {})

    def _is_near(self, load: Load) -> bool:
        return abs(load.peak_bytes - self.predicted_bytes) <= FAR * self.predicted_bytes

    def _is_seen_again(self, load: Load) -> bool:
        return any(
            abs(other.peak_bytes - load.peak_bytes) <= SAME * load.peak_bytes
            for other in self.loads
            if other.attempt != load.attempt
        )


def key_of(recipe: Recipe, card: str) -> str:
    """The same for the same things, in every process."""
    return hashlib.sha256(repr((astuple(recipe), card)).encode()).hexdigest()[:32]


def with_load(
    known: Learned, attempt: AttemptId, used_bytes: int, at: float, buffers: Buffers | None = None
) -> Learned:
    """What is known once the attempt, ready by now, was seen to use so much and to have said so of its
    buffers; the same object if no news."""
    own = next((load for load in known.loads if load.attempt == attempt), None)
    if own is None:
        loads = (*known.loads, Load(attempt, used_bytes, used_bytes, at, buffers or {}))
        return replace(known, loads=loads[-KEPT_LOADS:], floor_bytes=0)
    has_grown = used_bytes >= own.peak_bytes + WORTH_KEEPING_BYTES
    peak_bytes = used_bytes if has_grown else own.peak_bytes
    seen = replace(own, peak_bytes=peak_bytes, buffers=buffers or own.buffers)
    if seen == own:
        return known
    seen = replace(seen, at=at)
    return replace(known, loads=tuple(seen if load is own else load for load in known.loads))


def is_pushed_out(known: Learned, ready_at: float) -> bool:
    """Whether an attempt that was ready at this time (since 1970) is older than all loads that are kept.

    Of more attempts that run at a time than are kept, each would else come in again and push out another.
    """
    return len(known.loads) == KEPT_LOADS and all(ready_at < load.at for load in known.loads)


def with_higher_floor(known: Learned, reserved_bytes: int, usable_bytes: int) -> Learned:
    """So much was not enough: a twentieth or 256 MiB more is needed, but never more than a card has."""
    more = reserved_bytes + max(reserved_bytes // 20, OOM_STEP_BYTES)
    return replace(known, floor_bytes=max(known.floor_bytes, min(more, usable_bytes)))


def nearest(recipe: Recipe, card: str, known: Iterable[Learned]) -> Learned | None:
    """What differs only in context or cache types, on the same card, and is believed; the closest context."""
    candidates = [
        learned
        for learned in known
        if learned.card == card and learned.recipe.is_near(recipe) and learned.believed()
    ]
    return min(
        candidates,
        key=lambda learned: (abs(learned.recipe.context_size - recipe.context_size), -learned.at),
        default=None,
    )


# --- for people


def models_by_recipe(models: Iterable[Model]) -> dict[Recipe, list[ModelId]]:
    """Which models a recipe is of; one whose entry says `auto` has a recipe for each of its variants."""
    found: dict[Recipe, list[ModelId]] = {}
    for model in models:
        for recipe in dict.fromkeys((model.recipe, *(variant.recipe for variant in model.variants))):
            if recipe is not None:
                found.setdefault(recipe, []).append(model.id)
    return found


def learned_view(
    known: Mapping[str, Learned], names: Mapping[Recipe, list[ModelId]]
) -> list[dict[str, object]]:
    """All that is stored, the newest first, in bytes; `models` are those that a row is of, and
    `believed_loads` so many of its loads as count."""
    return [
        {
            "key": row.key,
            "models": names.get(row.recipe, []),
            **asdict(row),
            "believed_loads": len(row.believed()),
        }
        for row in newest_first(known)
    ]


def newest_first(known: Mapping[str, Learned]) -> list[Learned]:
    return sorted(known.values(), key=lambda row: -row.at)
