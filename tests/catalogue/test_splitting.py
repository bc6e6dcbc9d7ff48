"""Models over several GPUs: what each carries, and that the service is told to split as was reserved."""

from pathlib import Path

import pytest
import yaml

from orchestrator.catalogue.alternatives import alternatives_of
from orchestrator.catalogue.read import Catalogue, read_catalogue
from orchestrator.core.draft import Draft
from orchestrator.core.entities import MIB, Device, DeviceKind
from orchestrator.core.preview import would_fit
from orchestrator.core.refusal import refusal
from orchestrator.local.llama import read_options
from tests.catalogue.conftest import LLAMA, House
from tests.core.worlds import ram, world
from tests.estimate.ggufs import llama

SPLIT = LLAMA.replace("environment: {", 'environment: {TENSOR_SPLIT: "{tensor_split}", ')
CARDS = [Device(f"GPU-{n}", n, "NVIDIA H100 80GB HBM3", DeviceKind.GPU, 80_000 * MIB) for n in range(3)]
CONTEXT_MIB = 500
"""A CUDA context has more than that, on any card."""


@pytest.fixture
def home(house: House) -> House:
    house.write("services/llama-cpp/service.yaml", SPLIT)
    llama(house.folder / "one.gguf")
    return house


def test_each_further_gpu_has_a_context_of_its_own(home: House) -> None:
    home.write("models.yaml", "models: {m: {service: llama-cpp, path: one.gguf, gpus: auto}}")
    demand = read_catalogue(home.settings(), on_gpu=True, gpus=CARDS).resolve("m").demand
    assert len(demand.splits) == len(CARDS)
    assert demand.splits[0].each_gpu_bytes == demand.gpu_bytes
    assert all(split.each_gpu_bytes > CONTEXT_MIB * MIB for split in demand.splits)
    names = [card.id for card in CARDS]
    for count in (1, 2, 3):
        placed = demand.spread(names[:count])
        assert [placed[name] for name in names[:count]] == [demand.splits[count - 1].each_gpu_bytes] * count


def test_over_so_many_it_is_what_it_is_when_it_is_always_over_so_many(home: House) -> None:
    entry = "{service: llama-cpp, path: one.gguf, gpus: "
    home.write("models.yaml", f"models: {{any: {entry}auto}}, two: {entry}2}}}}")
    models = read_catalogue(home.settings(), on_gpu=True, gpus=CARDS).models
    either, two = (models[name].demand.spread(["GPU-0", "GPU-1"]) for name in ("any", "two"))
    assert either == two
    assert either["host"] > models["any"].demand.host_bytes, "more buffers there, and they are counted"
    assert models["any"].demand.over(2).host_bytes == either["host"]


def test_what_an_entry_says_of_ram_holds_over_however_many(home: House) -> None:
    home.write(
        "models.yaml",
        "models: {m: {service: llama-cpp, path: one.gguf, gpus: auto, host_memory: 7MiB}}",
    )
    demand = read_catalogue(home.settings(), on_gpu=True, gpus=CARDS).resolve("m").demand
    assert [demand.spread(["GPU-0", "GPU-1"][:count])["host"] for count in (1, 2)] == [7 * MIB] * 2


@pytest.mark.parametrize(
    ("entry", "is_told"),
    [
        ("gpus: 2", True),
        ("gpus: auto", True),
        ("gpus: [GPU-a, GPU-b]", True),
        ("gpus: 1", False),
        ("gpus: [GPU-a]", False),
        ("gpus: 0", False),
        ("gpus: 2, environment: {LLAMA_ARG_TENSOR_SPLIT: '{tensor_split}'}", False),
    ],
)
def test_a_service_that_does_not_say_how_to_split_is_told_of(house: House, entry: str, is_told: bool) -> None:
    llama(house.folder / "one.gguf")
    catalogue = house.read(f"models: {{m: {{service: llama-cpp, path: one.gguf, {entry}}}}}")
    assert ["tensor_split" in problem for problem in catalogue.problems] == [True] * is_told


def test_a_service_that_says_how_to_split_is_fine(home: House) -> None:
    catalogue = home.read("models: {m: {service: llama-cpp, path: one.gguf, gpus: 2}}")
    assert catalogue.problems == ()
    launch = catalogue.resolve("m").launch
    assert launch.environment["TENSOR_SPLIT"] == "{tensor_split}", "GPUs are chosen later"


@pytest.mark.parametrize("service", ["llama-cpp", "llama-cpp-upstream"])
def test_our_own_services_say_how_to_split(house: House, service: str) -> None:
    file = Path(__file__).parents[2] / "services" / service / "service.yaml"
    told = yaml.safe_load(file.read_text())
    assert "{tensor_split}" in [
        *told.get("environment", {}).values(),
        *told["container_environment"].values(),
    ]


def test_the_process_takes_the_shares(house: House) -> None:
    path = llama(house.folder / "one.gguf")
    for text, shares in {"1,1": (1.0, 1.0), "1": (1.0,), "": ()}.items():
        assert read_options({"MODEL_PATH": str(path), "TENSOR_SPLIT": text}).tensor_split == shares


def test_the_parts_over_several_gpus_are_of_that_way_and_add_up_to_what_each_is_given(home: House) -> None:
    home.write("models.yaml", "models: {m: {service: llama-cpp, path: one.gguf, gpus: auto}}")
    demand = read_catalogue(home.settings(), on_gpu=True, gpus=CARDS).resolve("m").demand
    for count in (1, 2, 3):
        way, each = demand.over(count), demand.splits[count - 1].each_gpu_bytes
        assert way.gpu_bytes == count * each
        sums = {device: sum(parts.values()) for device, parts in way.breakdown.items() if device != "host"}
        assert sums == {f"gpu{number}": each for number in range(count)}
    assert demand.over(2).breakdown["gpu0"]["weights"] < demand.over(1).breakdown["gpu0"]["weights"]
    assert demand.over(0) is demand, "in RAM it is what it was predicted for"


@pytest.mark.parametrize("each_mib", [900, 2000, 9000])
@pytest.mark.parametrize("says", ["", ", host_memory: 63000MiB", ", host_memory: 70000MiB"])
def test_what_would_fit_does_over_several_gpus_and_with_the_ram_that_is_declared(
    home: House, each_mib: int, says: str
) -> None:
    told = SPLIT.replace("environment: {", 'environment: {CONTEXT: "{context_size}", ')
    home.write("services/llama-cpp/service.yaml", told)
    llama(home.folder / "one.gguf", layers=32, embedding=4096)
    cards = [Device(f"GPU-{n}", n, CARDS[0].name, DeviceKind.GPU, each_mib * MIB) for n in range(2)]
    devices = [*cards, ram(64_000)]

    def read(context_size: int | str) -> Catalogue:
        entry = f"service: llama-cpp, path: one.gguf, gpus: auto, context_size: {context_size}{says}"
        home.write("models.yaml", f"models: {{m: {{{entry}}}}}")
        return read_catalogue(home.settings(), on_gpu=True, gpus=cards)

    catalogue = read(262_144)
    long, ways = catalogue.resolve("m"), alternatives_of(catalogue, catalogue.resolve("m"))
    assert ways is not None
    assert refusal(Draft(world(devices, [long]), {}), long) is not None
    found = would_fit(world(devices, [long]), {}, long, ways)
    assert bool(found) == (each_mib > 1000 and "70000" not in says)
    for one in found:
        if "context_size" in one.parameters:
            shorter = read(one.parameters["context_size"]).resolve("m")
            assert refusal(Draft(world(devices, [shorter]), {}), shorter) is None
            assert one.demand in [shorter.demand.over(count) for count in (1, 2)]
        assert one.demand.gpu_bytes <= 2 * each_mib * MIB
