"""Make the images of compose.yaml without a registry: on the tests' own Debian, with Debian's packages.

    orchestrator-test/doors           Caddy and HAProxy
    orchestrator-test/builder         Python with pip and venv, which trusts whom this machine trusts
    orchestrator-test/orchestrator    of the repository's own Dockerfile, with a tag for its content

The first time needs Debian's mirror and PyPI.
"""

import os
from pathlib import Path

from docker.errors import BuildError

from tests.images.build import BASE, _build, build_base, engine

ROOT = Path(__file__).parents[2]
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
INSTALL = "apt-get install -y -qq --no-install-recommends"
DOORS_RECIPE = f"""\
FROM {BASE}
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive {INSTALL} caddy haproxy >/dev/null && apt-get clean
"""
BUILDER_RECIPE = f"""\
FROM {BASE}
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive {INSTALL} python3-pip python3-venv >/dev/null
"""
TRUST = """\
COPY certificates.crt /certificates.crt
ENV PIP_CERT=/certificates.crt
"""


def build_doors() -> str:
    """Build the image that Caddy and the socket proxy share in the tests; returns its tag."""
    return _build("orchestrator-test/doors", "", DOORS_RECIPE, {}, network_mode="host")


def build_builder() -> str:
    """What the Dockerfile's first stage runs on; returns its tag."""
    recipe, files = BUILDER_RECIPE, {}
    if CERTIFICATES.exists():
        recipe, files = recipe + TRUST, {"certificates.crt": CERTIFICATES}
    if index := os.environ.get("PIP_INDEX_URL"):
        recipe += f"ENV PIP_INDEX_URL={index}\n"
    return _build("orchestrator-test/builder", "", recipe, files, network_mode="host")


def build_orchestrator() -> str:
    """Build the repository's Dockerfile; returns a tag that names the content."""
    arguments = {"BASE": build_base(), "BUILD_BASE": build_builder()}
    with engine() as client:
        try:
            image, _ = client.images.build(path=str(ROOT), buildargs=arguments, network_mode="host", rm=True)
        except BuildError as error:
            lines = "".join(str(line.get("stream") or line.get("error") or "") for line in error.build_log)
            raise RuntimeError(f"building the orchestrator's image failed:\n{lines}") from error
        tag = f"orchestrator-test/orchestrator:{str(image.id).removeprefix('sha256:')[:12]}"
        image.tag(tag)
    return tag


if __name__ == "__main__":
    print(build_doors())
    print(build_orchestrator())
