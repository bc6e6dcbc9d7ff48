"""What a model's memory is remembered by, and for which card it is predicted."""

from pathlib import Path

from orchestrator.catalogue.read import read_catalogue
from orchestrator.catalogue.recipes import HEAD_BYTES, fingerprint
from orchestrator.core.entities import MIB, Device, DeviceKind, Model
from tests.catalogue.conftest import House
from tests.estimate.ggufs import llama

ENTRY = "service: llama-cpp, path: one.gguf, context_size: 4096"
H100 = Device("GPU-h", 0, "NVIDIA H100 80GB HBM3", DeviceKind.GPU, 80_000 * MIB)
SMALL = Device("GPU-s", 1, "NVIDIA GeForce RTX 3060", DeviceKind.GPU, 12_000 * MIB)


def read(house: House, entries: dict[str, str], *, gpus: tuple[Device, ...] = ()) -> dict[str, Model]:
    lines = "".join(f"  {name}: {{{entry}}}\n" for name, entry in entries.items())
    house.write("models.yaml", f"models:\n{lines}")
    return dict(read_catalogue(house.settings(), on_gpu=True, gpus=gpus).models)


def test_the_same_file_run_in_the_same_way_is_the_same_wherever_it_lies(house: House) -> None:
    for name in ("one.gguf", "copies/other.gguf"):
        llama(house.folder / name)
    copy = ENTRY.replace("one.gguf", "copies/other.gguf")
    models = read(house, {"one": ENTRY, "copy": f"{copy}, aliases: [c], priority: 9, idle_after: 5m"})
    assert models["one"].recipe == models["copy"].recipe is not None


def test_whatever_decides_memory_makes_another_recipe(house: House) -> None:
    llama(house.folder / "one.gguf")
    llama(house.folder / "mmproj.gguf")
    more = [
        "parallel: 2", "n_gpu_layers: 1", "cache_type_k: q8_0", "cache_type_v: q8_0", "gpus: 2",
        "mmproj: mmproj.gguf", "environment: {LLAMA_ARG_UBATCH: '1024'}",
    ]  # fmt: skip
    entries = {f"m{number}": f"{ENTRY}, {each}" for number, each in enumerate(more)}
    entries |= {"plain": ENTRY, "longer": ENTRY.replace("4096", "8192")}
    recipes = {model.recipe for model in read(house, entries).values()}
    assert len(recipes) == len(entries)


def test_where_there_is_no_gpu_or_no_file_nothing_is_remembered(house: House) -> None:
    llama(house.folder / "one.gguf")
    models = read(house, {"in-ram": f"{ENTRY}, gpus: 0", "lost": ENTRY.replace("one", "lost")})
    assert models["in-ram"].recipe is None
    assert models["lost"].problem is not None


def test_a_fingerprint_is_of_size_and_beginning(tmp_path: Path) -> None:
    file = tmp_path / "big"
    file.write_bytes(bytes(HEAD_BYTES + 10))
    first = fingerprint(file)
    file.write_bytes(bytes(HEAD_BYTES) + b"elsewhere!")
    assert fingerprint(file) == first, "only the beginning is read"
    file.write_bytes(b"x" + bytes(HEAD_BYTES + 9))
    assert fingerprint(file) != first
    file.write_bytes(bytes(HEAD_BYTES + 11))
    assert fingerprint(file) != first


def test_cudas_share_is_that_of_the_first_card_the_model_may_go_to(house: House) -> None:
    llama(house.folder / "one.gguf")
    entries = {"any": ENTRY, "there": f"{ENTRY}, gpus: [GPU-s]"}
    models = read(house, entries, gpus=(H100, SMALL))
    shares = {name: model.demand.breakdown["gpu0"]["cuda_context"] for name, model in models.items()}
    assert shares == {"any": 597 * MIB, "there": 84 * MIB}
    unknown = read(house, entries)["any"].demand.breakdown["gpu0"]["cuda_context"]
    assert unknown == 600 * MIB
