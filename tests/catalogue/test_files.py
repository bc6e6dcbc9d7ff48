"""The Hugging Face cache as its tools lay it out: links into blobs, a commit named by refs/main."""

from pathlib import Path

import pytest

from orchestrator.catalogue.files import Found, NotFound, find_in_hub, inside, latest
from orchestrator.hub.cache import hub_folder
from orchestrator.hub.names import stem
from tests.catalogue.conftest import House
from tests.estimate.ggufs import llama

PULL = "orchestrator pull m"


def download(hub: Path, repo: str, commit: str, *names: str, main: bool = True) -> Path:
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for name in names:
        blob = llama(folder / "blobs" / f"{commit}-{name.replace('/', '-')}")
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
    (folder / "refs").mkdir(exist_ok=True)
    if main:
        (folder / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def hub(house: House) -> Path:
    return house.folder / "hf" / "hub"


def test_the_main_revision_by_pattern_without_regard_to_case(hub: Path) -> None:
    download(hub, "Org/Name-GGUF", "old", "Name-Q4_K_M.gguf")
    new = download(hub, "Org/Name-GGUF", "new", "Name-Q4_K_M.gguf", "Name-Q8_0.gguf", "mmproj-F16.gguf")

    found = find_in_hub("org/name-gguf", "*q4_k_m.gguf", "mmproj*.gguf", PULL)
    assert found == Found(new / "Name-Q4_K_M.gguf", new / "mmproj-F16.gguf")
    download(hub, "Org/Name-GGUF", "new", "mmproj-F32.gguf", "mmproj-Q8_0.gguf")
    assert find_in_hub("org/name-gguf", "*q8_0.gguf", "mmproj*.gguf", PULL).mmproj == new / "mmproj-Q8_0.gguf"
    assert find_in_hub("Org/Name-GGUF", "name-q8_0.GGUF", None, PULL).path == new / "Name-Q8_0.gguf"


def test_patterns_take_the_first_shard_and_never_a_projector(hub: Path) -> None:
    names = [f"Q4/M-0000{part}-of-00002.gguf" for part in (1, 2)]
    snapshot = download(hub, "o/m", "c", *names, "mmproj-q4.gguf")
    assert find_in_hub("o/m", "*.gguf", None, PULL).path == snapshot / names[0]
    assert find_in_hub("o/m", "q4/m-*", None, PULL).path == snapshot / names[0]


@pytest.mark.parametrize(
    ("repo", "file", "says"),
    [
        ("o/absent", "x.gguf", "o/absent is not in the Hugging Face cache ("),
        ("o/m", "*q5*", "no file '*q5*' is in the cache; get it with: orchestrator pull m"),
        ("o/m", "*.gguf", "matches 2 files: a.gguf, b.gguf; name one of them"),
        ("o/other", "*", "get it with: orchestrator pull m"),
    ],
)
def test_what_is_not_there_says_how_to_get_it(hub: Path, repo: str, file: str, says: str) -> None:
    download(hub, "o/m", "c", "a.gguf", "b.gguf")
    for commit in ("c1", "c2"):
        download(hub, "o/other", commit, "a.gguf", main=False)
    with pytest.raises(NotFound) as caught:
        find_in_hub(repo, file, None, PULL)
    assert says in str(caught.value)


def test_a_lone_snapshot_without_a_name_is_taken(hub: Path) -> None:
    snapshot = download(hub, "o/m", "c", "a.gguf", main=False)
    assert find_in_hub("o/m", "a.gguf", None, PULL).path == snapshot / "a.gguf"


def test_a_container_gets_the_whole_cache_so_that_links_hold(house: House, hub: Path) -> None:
    download(hub, "o/m", "c", "a.gguf", "mmproj.gguf")
    model = house.read(
        "models: {m: {service: llama-cpp, source: {repo: o/m, file: a.gguf, mmproj: mmproj.gguf}}}"
    ).resolve("m")
    assert model.problem is None
    assert model.launch.mounts == ((str(hub), "/models"),)
    below = "models--o--m/snapshots/c"
    assert model.launch.container_environment["MODEL_PATH"] == f"/models/{below}/a.gguf"
    assert model.launch.container_environment["MMPROJ_PATH"] == f"/models/{below}/mmproj.gguf"
    assert model.launch.environment["MODEL_PATH"] == str(hub / below / "a.gguf")
    assert (Path(model.launch.mounts[0][0]) / below / "a.gguf").resolve().is_relative_to(hub)


def test_links_elsewhere_are_followed_before_mounting(house: House, hub: Path) -> None:
    real = llama(house.folder / "disk" / "real.gguf")
    (house.folder / "links").mkdir()
    link = house.folder / "links" / "m.gguf"
    link.symlink_to(real)
    seen = inside(Found(link))
    assert (seen.path, seen.mounts) == ("/models/real.gguf", ((str(house.folder / "disk"), "/models"),))

    snapshot = download(hub, "o/m", "c", "a.gguf")
    (house.folder / "links" / "hub.gguf").symlink_to(snapshot / "a.gguf")
    seen = inside(Found(house.folder / "links" / "hub.gguf"))
    assert seen.path == "/models/models--o--m/blobs/c-a.gguf"


def test_files_of_two_folders_are_two_mounts(house: House) -> None:
    first, second = llama(house.folder / "a" / "m.gguf"), llama(house.folder / "b" / "p.gguf")
    seen = inside(Found(first, second))
    assert (seen.path, seen.mmproj) == ("/models/m.gguf", "/models-2/p.gguf")
    assert dict(seen.mounts) == {str(first.parent): "/models", str(second.parent): "/models-2"}
    assert inside(Found(first, llama(first.with_name("p.gguf")))).mounts == ((str(first.parent), "/models"),)


def test_where_the_cache_is(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_folder() == house.folder / "hf" / "hub"
    monkeypatch.delenv("HF_HOME")
    assert hub_folder() == Path.home() / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/data/hub")
    assert hub_folder() == Path("/data/hub")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("a.gguf", "a"), ("a-00001-of-00009.gguf", "a"), ("a-1-of-2.gguf", "a-1-of-2"), ("a.b.GGUF", "a.b")],
)
def test_stems(name: str, wanted: str) -> None:
    assert stem(Path("/x") / name) == wanted


def test_a_path_with_latest_is_the_revision_that_main_names(house: House, hub: Path) -> None:
    download(hub, "Org/Name-GGUF", "old", "Name-Q4_K_M.gguf")
    new = download(hub, "Org/Name-GGUF", "new", "Name-Q4_K_M.gguf", "Q8/Name-Q8_0.gguf")
    folder = hub / "models--org--name-gguf" / "snapshots" / "latest"
    assert latest(folder / "name-q4_k_m.gguf") == new / "Name-Q4_K_M.gguf"
    assert latest(folder / "q8" / "name-q8_0.GGUF") == new / "Q8" / "Name-Q8_0.gguf"
    assert latest(house.folder / "snapshots.gguf") == house.folder / "snapshots.gguf"


def test_a_path_with_latest_says_what_is_there_and_how_to_get_it(hub: Path) -> None:
    new = download(hub, "o/m", "new", "m-q8_0.gguf")
    for repo, says in (("m", f"there is m-q8_0.gguf in {new}"), ("n", "models--o--n has no downloaded")):
        path = hub / f"models--o--{repo}" / "snapshots" / "latest" / "m-q4_k_m.gguf"
        with pytest.raises(NotFound) as caught:
            latest(path)
        assert says in str(caught.value)
        assert f"get it with: hf download o/{repo} m-q4_k_m.gguf" in str(caught.value)


def test_a_container_with_the_caches_volume_needs_no_mount(house: House, hub: Path) -> None:
    snapshot = download(hub, "o/m", "c", "m.gguf", "mmproj.gguf")
    own = llama(house.folder / "own" / "own.gguf")
    below = "/data/hf/hub/models--o--m/snapshots/c"
    both = inside(Found(snapshot / "m.gguf", snapshot / "mmproj.gguf"), "/data/hf")
    assert (both.path, both.mmproj) == (f"{below}/m.gguf", f"{below}/mmproj.gguf")
    assert both.mounts == ()
    assert both.needs_hub
    other = inside(Found(own), "/data/hf")
    assert (other.path, other.mounts, other.needs_hub) == (
        "/models/own.gguf",
        ((str(own.parent), "/models"),),
        False,
    )


def test_a_cache_outside_its_home_is_in_no_volume(
    house: House, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(house.folder / "elsewhere"))
    snapshot = download(house.folder / "elsewhere", "o/m", "c", "m.gguf")
    with pytest.raises(NotFound, match="unset HF_HUB_CACHE"):
        inside(Found(snapshot / "m.gguf"), "/data/hf")
