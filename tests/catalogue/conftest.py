"""A household of its own for each test: a folder with services and models.yaml, and no outside settings."""

import os
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from orchestrator.catalogue.read import Catalogue, read_catalogue
from orchestrator.core.errors import CatalogueError
from orchestrator.settings import Settings, load_settings

LLAMA = """\
image: llama:1
command: [python, -m, orchestrator.local.llama]
port: 8000
environment: {MODEL_PATH: "{path}", MMPROJ_PATH: "{mmproj}", MODEL_NAME: "{served_name}"}
memory: gguf
"""
COMFY = "image: comfy:1\nport: 8188\napi: http\nhealth: {path: /system_stats}\n"


@dataclass(frozen=True)
class House:
    folder: Path

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return path

    def settings(self, **explicit: Any) -> Settings:
        given: dict[str, Any] = {
            "services": self.folder / "services",
            "database": self.folder / "state" / "o.db",
        }
        return load_settings(**given | explicit)

    def read(self, text: str | None = None, **explicit: Any) -> Catalogue:
        if text is not None:
            self.write("models.yaml", text)
        return read_catalogue(self.settings(**explicit))

    def errors(self, text: str | None = None, **explicit: Any) -> list[str]:
        with pytest.raises(CatalogueError) as caught:
            self.read(text, **explicit)
        return caught.value.message.splitlines()


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    for name in list(os.environ):
        if name.startswith(("ORCHESTRATOR_", "HF_", "XDG_CACHE_HOME")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    made = House(tmp_path)
    made.write("services/llama-cpp/service.yaml", LLAMA)
    made.write("services/comfyui/service.yaml", COMFY)
    return made
