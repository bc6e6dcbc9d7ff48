"""The test images exist, are not built twice, and carry what they should."""

from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.images.build import build_base, build_llama, build_mimic
from tests.images.llama_cpp import build_llama_cpp

pytestmark = pytest.mark.docker


@pytest.fixture
def client() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


def test_what_exists_is_not_built_again(client: docker.DockerClient) -> None:
    for build in (build_base, build_mimic, build_llama, build_llama_cpp):
        image = client.images.get(build())
        assert client.images.get(build()).id == image.id


def test_the_llama_image_has_a_working_wheel_and_the_extra_files(
    client: docker.DockerClient, tmp_path: Path
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "hello.py").write_text("import os, xllamacpp; print(os.getuid(), os.getcwd())\n")
    extra = {"package": tmp_path / "package", "/data/one.txt": tmp_path / "package" / "hello.py"}
    tag = build_llama(extra, command=("python3", "-m", "package.hello"))
    try:
        assert client.containers.run(tag, remove=True, read_only=True, cap_drop=["ALL"]) == b"10001 /app\n"
        listed = client.containers.run(tag, ["ls", "-l", "/data"], remove=True)
        assert b"-rw-r--r-- 1 root root" in listed
    finally:
        image = client.images.get(tag)
        build_llama()  # takes `latest` back
        client.images.remove(image.id, force=True)
