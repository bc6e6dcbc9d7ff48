"""`orchestrator learned` on a real database and a catalogue."""

import asyncio
import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from orchestrator.catalogue.read import read_catalogue
from orchestrator.cli.learned import table
from orchestrator.cli.main import app
from orchestrator.control.ports import Changes
from orchestrator.core.entities import MIB, Recipe
from orchestrator.core.learned import Learned, Load
from orchestrator.settings import load_settings
from orchestrator.store.learned import look
from orchestrator.store.repository import open_store
from tests.cli.stub import Stub
from tests.estimate.ggufs import llama

CARD = "NVIDIA H100 80GB HBM3, driver 580.159.04"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`one` was loaded twice, `two` ran out of memory; a third row is of nobody."""
    monkeypatch.chdir(tmp_path)
    llama(tmp_path / "one.gguf")
    (tmp_path / "services" / "llama-cpp").mkdir(parents=True)
    service = "command: [x]\nmemory: gguf\n"
    (tmp_path / "services" / "llama-cpp" / "service.yaml").write_text(service)
    entry = "{service: llama-cpp, path: one.gguf, context_size: %d}"
    (tmp_path / "models.yaml").write_text(f"models:\n  one: {entry % 4096}\n  two: {entry % 8192}\n")
    config = tmp_path / "orchestrator.yaml"
    config.write_text(f"services: {tmp_path}/services\nmodels: {tmp_path}/models.yaml\ndatabase: x.db\n")
    settings = load_settings(config)
    models = read_catalogue(settings, on_gpu=True).models
    one, two = models["one"].recipe, models["two"].recipe
    assert one is not None
    assert two is not None
    loads = tuple(Load(f"a{n}", 600 * MIB, 612 * MIB, time.time() - 60) for n in range(2))
    rows = [
        Learned(one, CARD, 620 * MIB, loads),
        Learned(two, CARD, 640 * MIB, floor_bytes=900 * MIB),
        Learned(one, "another card", 620 * MIB, loads[:1]),
    ]
    store, _ = open_store(settings.database, "boot", time.time)
    asyncio.run(store.save(Changes(learned={row.key: row for row in rows})))
    store.close()
    return config


def run(config: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["learned", *words, "--config", str(config)])


def test_it_is_listed_by_model_and_exported_with_every_load(config: Path) -> None:
    shown = run(config, "list")
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert len(lines) == 4
    assert any("one" in line and CARD in line and "612 MiB" in line for line in lines)
    assert any("two" in line and "above 900 MiB" in line for line in lines)
    rows = json.loads(run(config, "list", "--json").output)["learned"]
    assert {tuple(row["models"]) for row in rows} == {("one",), ("two",)}
    assert [len(row["loads"]) for row in rows] == [2, 1, 0]
    assert rows[0]["recipe"]["context_size"] == 4096


def test_bytes_of_a_model_over_several_gpus_are_of_each() -> None:
    recipe = Recipe("file", "service", 8192, 999, 4, "f16", "f16", 2)
    row = Learned(recipe, "RTX 3090", 620 * MIB, (Load("a", 612 * MIB, 612 * MIB, 1.0),))
    cells = [str(cell) for column in table([row], {}, 2.0).columns for cell in column.cells]
    assert "2 × RTX 3090, on each:" in cells
    assert "612 MiB" in cells


def test_a_models_rows_one_row_or_all_are_forgotten(config: Path) -> None:
    path = load_settings(config).database
    other = next(key for key, row in look(path).items() if row.card == "another card")
    assert run(config, "forget", other[:8]).output == "1 row is forgotten.\n"
    assert run(config, "forget", "one").output == "1 row is forgotten.\n"
    assert [row.floor_bytes for row in look(path).values()] == [900 * MIB]
    assert run(config, "forget", "all").exit_code == 0
    assert "Nothing was learned yet" in run(config, "list").output
    missing = run(config, "forget", "three")
    assert missing.exit_code == 1
    assert "Nothing was learned of 'three'" in missing.output


def test_beside_a_server_that_does_not_answer_nothing_is_forgotten(config: Path) -> None:
    store, _ = open_store(load_settings(config).database, "boot", time.time)
    try:
        assert run(config, "list").exit_code == 0
        refused = run(config, "forget", "one", "--url", "http://127.0.0.1:9")
    finally:
        store.close()
    assert refused.exit_code == 2
    assert "No orchestrator answers at http://127.0.0.1:9" in refused.output
    assert len(look(load_settings(config).database)) == 3


def test_a_server_with_another_database_is_asked_to_forget_nothing(config: Path, stub: Stub) -> None:
    """The same model on the same card has the same key there."""
    path = load_settings(config).database
    rows = json.loads(run(config, "list", "--json").output)["learned"]
    for row in rows:
        row["loads"] = [load | {"attempt": f"other-{load['attempt']}"} for load in row["loads"]]
    store, _ = open_store(path, "boot", time.time)
    try:
        for count in (len(rows), 0):
            stub.answers["GET /learned"] = (200, {"learned": rows[:count]})
            refused = run(config, "forget", "one", "--url", stub.url)
            assert refused.exit_code == 1
            assert f"it is not the one at {stub.url}" in " ".join(refused.output.split())
    finally:
        store.close()
    assert {method for method, _, _ in stub.asked} == {"GET"}


def test_without_a_database_that_is_said(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["learned", "list", "--database", str(tmp_path / "no.db")])
    assert result.exit_code == 1
    assert "There is no database" in result.output
