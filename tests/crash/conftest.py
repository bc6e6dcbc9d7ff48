"""The engines and images that the end-to-end tests have, and how many rounds to run."""

from __future__ import annotations

import os
import random

import pytest

from tests.e2e.conftest import engine, mimic_image, network

__all__ = ["engine", "mimic_image", "network"]


@pytest.fixture(scope="session")
def seed() -> int:
    """CRASH_SEED repeats a run; else every run is another one, and says its seed."""
    return int(os.environ.get("CRASH_SEED") or random.randrange(1_000_000))


@pytest.fixture(scope="session")
def rounds() -> int:
    """CRASH_ROUNDS, else what a run of all tests has the time for."""
    return int(os.environ.get("CRASH_ROUNDS") or 20)
