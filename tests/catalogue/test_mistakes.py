"""What is wrong with a value is told in our words, never in the validator's."""

import re

import pytest
from pydantic import BaseModel, ValidationError

from orchestrator.catalogue.explain import explain
from orchestrator.catalogue.schema import Health, ModelEntry, ModelsFile, ServiceEntry, Source
from orchestrator.core.errors import CatalogueError
from orchestrator.settings import Settings, load_settings
from tests.catalogue.conftest import House

ODD: list[object] = [
    *("x", "", "\0", "/x y", "a" * 300, "a/b/c", "10.0.0.0/8=foo"),
    *(5, -5, 10**20, 1.5, True, None, [], ["x"], [1], {}, {"x": 1}, {"a": "b"}),
]
RAW = re.compile(r"Input|String|Tuple|List|Dictionary|should|valid |Value error|unable|pattern|\^")
ROOTS: list[tuple[type[BaseModel], dict[str, object]]] = [
    (ServiceEntry, {"image": "x"}),
    (ModelEntry, {"service": "s"}),
    (Source, {}),
    (Health, {}),
    (ModelsFile, {}),
]


@pytest.mark.parametrize(("root", "base"), ROOTS, ids=lambda each: getattr(each, "__name__", ""))
def test_of_the_catalogue(root: type[BaseModel], base: dict[str, object]) -> None:
    told = []
    for field in root.model_fields:
        for value in ODD:
            try:
                root.model_validate({**base, field: value})
            except ValidationError as error:
                told += explain(error, root, lambda _, text: text)
    assert told
    assert [text for text in told if RAW.search(re.sub(r"got .*?, expected", "", text))] == []


def test_of_the_settings(house: House) -> None:
    told = []
    for field in set(Settings.model_fields) - {"config"}:
        for value in ODD:
            try:
                load_settings(**{field: value})
            except CatalogueError as error:
                told += error.message.splitlines()
    assert told
    assert [text for text in told if RAW.search(re.sub(r"got .*?, expected", "", text))] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("source: {repo: nothing, file: x}", 'source.repo: got "nothing", expected OWNER/NAME'),
        ("served_name: ''", 'served_name: got "", expected some text'),
    ],
)
def test_patterns_have_words(house: House, text: str, told: str) -> None:
    (error,) = house.errors("models:\n  a:\n    service: comfyui\n    memory: 1GiB\n    " + text + "\n")
    assert f"models.a.{told}" in error
