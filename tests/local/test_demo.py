"""Demo models: the same seed gives the same bytes, whole or not at all."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.catalogue.read import read_catalogue
from orchestrator.estimate.gguf_header import read_gguf
from orchestrator.local.demo import DemoError, ensure_demos, make_demo
from orchestrator.settings import Settings

REPOSITORY = Path(__file__).parents[2]


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        make_demo(tmp_path / "deep" / f"{name}.gguf", seed)
    a, b, c = ((tmp_path / "deep" / f"{name}.gguf").read_bytes() for name in "abc")
    assert a == b != c
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.gguf", "b.gguf", "c.gguf"]

    header = read_gguf(tmp_path / "deep" / "a.gguf")
    assert (header.architecture, header.of("block_count")) == ("llama", 2)
    assert 400_000 < header.tensor_bytes < header.file_bytes < 600_000


def test_made_at_the_same_time_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "d.gguf"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: make_demo(path, 7), range(8)))
    make_demo(tmp_path / "e.gguf", 7)
    assert path.read_bytes() == (tmp_path / "e.gguf").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_only_missing_demos_are_made(tmp_path: Path) -> None:
    settings = Settings(
        services=REPOSITORY / "services",
        models=REPOSITORY / "models.yaml",
        database=tmp_path / "state" / "o.db",
    )
    catalogue = read_catalogue(settings)
    made = ensure_demos(catalogue)
    assert [path.name for path in made] == ["demo-7.gguf", "demo-8.gguf"]
    assert all(path.parent == tmp_path / "state" / "demo" for path in made)
    assert ensure_demos(catalogue) == ()

    made[0].unlink()
    made[1].write_bytes(b"GGUF")
    broken = read_catalogue(settings)
    assert "Delete it; it is made again at the next start" in str(broken.resolve("demo-2").problem)
    assert ensure_demos(broken) == (made[0],)


def test_reasons_when_it_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DemoError, match="cannot be written"):
        make_demo(tmp_path / "file" / "d.gguf", 7)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DemoError, match="extra 'local'"):
        make_demo(tmp_path / "d.gguf", 7)
    assert not (tmp_path / "d.gguf").exists()
