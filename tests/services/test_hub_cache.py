"""Paths as people write them find the files that are meant; where there is none, the message helps."""

from pathlib import Path

import pytest

import hub_cache
import serving
from orchestrator.catalogue.files import find_in_hub

REPO = "Qwen/Qwen3-VL-30B-A3B-Instruct-GGUF"
FOLDER = "models--Qwen--Qwen3-VL-30B-A3B-Instruct-GGUF"
PROMISED = "qwen3-vl-30b-a3b-instruct-q4_k_m.gguf"
REAL = "Qwen3VL-30B-A3B-Instruct-Q4_K_M.gguf"
"""As the repository really calls it."""


class Cache:
    """A Hugging Face cache with the files a test wants."""

    def __init__(self, root: Path) -> None:
        self.hub = root / "hub"

    def add(self, name: str, commit: str = "c1", *, folder: str = FOLDER, main: str | None = "c1") -> Path:
        path = self.hub / folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF")
        if main is not None:
            (self.hub / folder / "refs").mkdir(exist_ok=True)
            (self.hub / folder / "refs" / "main").write_text(main)
        return path

    def path(self, name: str, revision: str = "latest", folder: str = FOLDER) -> Path:
        return self.hub / folder / "snapshots" / revision / name


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


def test_latest_is_what_refs_main_names(cache: Cache) -> None:
    cache.add(PROMISED, "old")
    new = cache.add(PROMISED, "new", main="new")
    assert hub_cache.find(cache.path(PROMISED)) == new


def test_latest_is_the_only_snapshot_where_no_ref_is(cache: Cache) -> None:
    only = cache.add(PROMISED, "one", main=None)
    assert hub_cache.find(cache.path(PROMISED)) == only
    cache.add(PROMISED, "two", main=None)
    with pytest.raises(hub_cache.Missing, match=f"in snapshot one: {PROMISED}; in snapshot two: {PROMISED}"):
        hub_cache.find(cache.path(PROMISED))


@pytest.mark.parametrize("name", [PROMISED, PROMISED.upper(), REAL])
def test_case_and_punctuation_do_not_count(cache: Cache, name: str) -> None:
    there = cache.add(name)
    assert hub_cache.find(cache.path(PROMISED)) == there
    assert hub_cache.find(cache.path(PROMISED, folder=FOLDER.lower())) == there


def test_the_exact_name_wins_over_similar_ones(cache: Cache) -> None:
    for name in ("a-b.gguf", "A-B.gguf", "ab.gguf"):
        assert cache.add(name)
    assert hub_cache.find(cache.path("A-B.gguf")).name == "A-B.gguf"
    assert hub_cache.find(cache.path("ab.gguf")).name == "ab.gguf"
    with pytest.raises(hub_cache.Missing):
        hub_cache.find(cache.path("A-b.gguf"))  # which of the two?


def test_the_orchestrator_finds_the_same(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read such caches: a catalogue's entry and a container's MODEL_PATH must mean one file."""
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.hub))
    cache.add("Tiny-Q4_K_M.gguf", "old")
    cache.add("mmproj-Tiny-F16.gguf", "new", main="new")
    cache.add("Tiny-Q4_K_M.gguf", "new", main="new")
    found = find_in_hub(REPO, "*q4_k_m.gguf", "mmproj*.gguf", "pull")
    model = hub_cache.find(cache.path("tiny-q4_k_m.gguf"))
    assert (model, hub_cache.projector_beside(model)) == (found.path, found.mmproj)


def test_a_file_outside_a_hub_is_found_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "Model-Q8_0.gguf").write_bytes(b"GGUF")
    assert hub_cache.find(tmp_path / "model-q8_0.gguf").name == "Model-Q8_0.gguf"
    with pytest.raises(hub_cache.Missing, match=r"GGUF files in that folder: Model-Q8_0\.gguf"):
        hub_cache.find(tmp_path / "other.gguf")
    with pytest.raises(hub_cache.Missing, match="is the volume or folder mounted there"):
        hub_cache.find(tmp_path / "nowhere" / "other.gguf")


def test_what_is_missing_is_told_with_what_is_there_and_how_to_get_it(cache: Cache) -> None:
    cache.add("Qwen3VL-30B-A3B-Instruct-Q8_0.gguf")
    cache.add("README.md")
    with pytest.raises(hub_cache.Missing) as caught:
        hub_cache.find(cache.path(PROMISED))
    told = str(caught.value)
    assert f"there is no model file {PROMISED}" in told
    assert f"looked for:  {cache.path(PROMISED)}" in told
    assert "there is:    in snapshot c1: Qwen3VL-30B-A3B-Instruct-Q8_0.gguf\n" in told
    assert f"services/llama-cpp/download-model.sh {REPO} {PROMISED}" in told
    assert f"docker exec llama-cpp huggingface-cli download {REPO} {PROMISED}" in told
    assert (
        f"-v hf-cache:/data/.huggingface orchestrator/llama-cpp:cuda12.8 huggingface-cli download {REPO}"
        in told
    )


def test_a_missing_repository_is_told_with_those_that_are_there(cache: Cache) -> None:
    cache.add("one.gguf", folder="models--acme--one-GGUF")
    with pytest.raises(hub_cache.Missing, match=r"no such repository in .*; it has acme/one-GGUF"):
        hub_cache.find(cache.path(PROMISED))


def test_a_missing_cache_is_told(cache: Cache) -> None:
    with pytest.raises(hub_cache.Missing, match="is the volume hf-cache mounted"):
        hub_cache.find(cache.path(PROMISED))


def test_a_revision_that_is_named_is_never_replaced_by_another(cache: Cache) -> None:
    cache.add(PROMISED)
    with pytest.raises(hub_cache.Missing, match=r"no snapshot c9 of .*; its snapshots are c1"):
        hub_cache.find(cache.path(PROMISED, "c9"))


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (("mmproj-X-Q8_0.gguf", "mmproj-X-F16.gguf", "X-F16.gguf"), "mmproj-X-F16.gguf"),
        (("mmproj-X-f32.gguf", "mmproj-X-BF16.gguf"), "mmproj-X-BF16.gguf"),
        (("X-Q4_K_M.gguf", "mmproj.txt"), None),
    ],
)
def test_which_projector_is_taken(names: tuple[str, ...], best: str | None) -> None:
    assert hub_cache.best_projector(names) == best


def test_the_default_is_the_promised_path() -> None:
    assert str(serving.default_model({})) == f"/data/.huggingface/hub/{FOLDER}/snapshots/latest/{PROMISED}"
