"""What a load has shown counts for the next one: measured on the device, kept over a restart."""

from pathlib import Path
from typing import Any

from tests.e2e.world import Engine, World, mimic, open_house, open_world, until
from tests.estimate.shapes import qwen3_8b

MIB_OF_MIMIC = 4120
"""A fifth less than what is predicted of the shape."""
SAYS = """
load_tensors:        CUDA0 model buffer size =  3000.00 MiB
load_tensors:   CPU_Mapped model buffer size =   333.84 MiB
llama_kv_cache:      CUDA0 KV buffer size =   576.00 MiB
sched_reserve:      CUDA0 compute buffer size =   304.00 MiB
"""
FULL_MIB, SMALL_MIB, REAL_MIB = 19568, 4096, 4700


def predicted(folder: Path, **more: Any) -> dict[str, Any]:
    """A model whose file tells what it takes; the mimic takes something else."""
    file = qwen3_8b(36, 4096).write(folder)
    return {
        "service": "llama-cpp",
        "path": str(file),
        "memory": None,
        "environment": {"MIMIC_MIB": str(MIB_OF_MIMIC), "MIMIC_SAYS": SAYS},
        "context_size": 4096,
        **more,
    }


async def footprint(world: World, model: str) -> tuple[str, int]:
    found = (await world.view(model))["footprint"]
    return found["source"], found["gpu_mib"]


async def wait_source(world: World, model: str, source: str) -> int:
    """Wait until the footprint comes from there, and return its MiB."""

    async def there() -> int:
        found, mib = await footprint(world, model)
        return mib if found == source else 0

    return await until(there, what=f"the footprint of '{model}' should be {source}")


async def test_after_one_load_the_footprint_is_what_the_device_showed(engine: Engine, tmp_path: Path) -> None:
    models = {
        "one": predicted(tmp_path / "files"),
        "again": predicted(tmp_path / "copies"),
        "longer": predicted(tmp_path / "files", context_size=65536),
        "split": predicted(tmp_path / "files", parallel=1),
    }
    services = {"llama-cpp": {"memory": "gguf"}}
    with open_house(tmp_path, engine, models, services=services) as house:
        async with open_world(house) as world:
            source, first_mib = await footprint(world, "one")
            assert source == "predicted"
            assert 1.15 * MIB_OF_MIMIC < first_mib < 1.25 * MIB_OF_MIMIC
            _, longer_mib = await footprint(world, "longer")
            await world.load("one")
            learned_mib = await wait_source(world, "one", "measured")
            assert 0 <= learned_mib - house.gpus.used_mib(0) <= 0.005 * MIB_OF_MIMIC
            assert await footprint(world, "again") == ("measured", learned_mib), "a copy of the same file"
            moved = await footprint(world, "longer")
            assert moved == ("measured, moved", longer_mib + learned_mib - first_mib)
            assert (await footprint(world, "split"))[0] == "predicted", "other slots are another thing"
            placed = (await world.view("one"))["instance"]["memory"]
            await world.unload("one")
            await world.load("again")
            reserved = (await world.view("again"))["instance"]["memory"][world.gpus.uuids[0]]["reserved_mib"]
            assert reserved == learned_mib < placed[world.gpus.uuids[0]]["reserved_mib"]
            await world.unload("again")
            house.server.restart()
            assert await footprint(world, "one") == ("measured", learned_mib)


async def test_what_the_log_says_of_buffers_is_noted_with_the_load(engine: Engine, tmp_path: Path) -> None:
    models = {"one": predicted(tmp_path / "files")}
    with open_house(tmp_path, engine, models, services={"llama-cpp": {"memory": "gguf"}}) as house:
        async with open_world(house) as world:
            await world.load("one")

            async def parts() -> dict[str, int] | None:
                found = (await world.view("one"))["footprint"]
                own: dict[str, int] = found["breakdown"]["gpu0"]
                return own if found["source"] == "measured" and "weights" in own else None

            own = await until(parts, what="the footprint of 'one' should have what its log says")
            named = {"weights": 3000, "kv_cache": 576, "compute": 304}
            assert own.pop("other") == (await footprint(world, "one"))[1] - sum(named.values())
            assert own == named
            await world.unload("one")
            house.server.restart()
            (row,) = (await world.get("/learned"))["learned"]
            assert row["loads"][0]["buffers"]["CPU_Mapped"] == {"model": round(333.84 * 2**20)}
            again = (await world.view("one"))["footprint"]["breakdown"]["gpu0"]
            assert {name: again[name] for name in named} == named


async def test_a_start_without_room_is_tried_again_with_more(engine: Engine, tmp_path: Path) -> None:
    """It declares 4096 MiB and takes 4700: beside the other it does not fit, and the other makes room."""
    small = {**mimic(SMALL_MIB), "environment": {"MIMIC_MIB": str(REAL_MIB)}}
    models = {"full": mimic(FULL_MIB), "small": small}
    with open_house(tmp_path, engine, models) as house:
        async with open_world(house) as world:
            assert SMALL_MIB < house.gpus.capacity_mib(0) - FULL_MIB < REAL_MIB
            await world.load("full")
            with world.refusals_expected():
                answer = await world.chat("small")
            assert answer.status_code == 200, answer.text
            assert world.seen.holding("full") == {}
            assert house.gpus.used_mib(0) == REAL_MIB
            (why,) = await world.notes("failed", "small")
            assert "the GPU had too little memory for it" in why
            assert len(await world.notes("starting", "small")) == 2
            assert await wait_source(world, "small", "measured") == REAL_MIB, "what is declared is raised"
