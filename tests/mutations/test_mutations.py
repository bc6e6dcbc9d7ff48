"""Tests that catch nothing prove nothing: each of these defects is planted, and must be caught by name.

A copy of the package and of the fast tests is changed in one place and tested in a process of its own.
The tests that are named for a defect must fail there with a broken claim, and pass without the defect.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mutations.catalogue import MUTATIONS, Edit, Mutation

ROOT = Path(__file__).parents[2]
AT_ONCE = 2
LIMIT_S = 240
EXAMPLES = 400
"""How many runs of the stateful test a defect must not survive."""

pytestmark = pytest.mark.timeout(900)


def copy_of_the_package(folder: Path) -> Path:
    unwanted = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("orchestrator", "tests/core", "tests/control"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def plant(folder: Path, edits: Iterable[Edit]) -> None:
    for edit in edits:
        path = folder / "orchestrator" / edit.module
        text = path.read_text()
        assert text.count(edit.old) == 1, f"{edit.module} has {text.count(edit.old)} times:\n{edit.old}"
        path.write_text(text.replace(edit.old, edit.new))


def outcomes(folder: Path, tests: Iterable[str]) -> dict[str, str]:
    """The first line of each test's failure, or "" where it passed, by test without its parameters.

    Raises AssertionError if anything went wrong besides failing claims.
    """
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", *tests, "--tb=line", f"--junitxml={report}"]
    command += [f"--basetemp={folder / 'tmp'}", f"--rootdir={folder}"]
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ORCHESTRATOR_STATEFUL_SHORT": str(EXAMPLES),
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode in (0, 1), (
        f"the tests could not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    found: dict[str, str] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        module = (case.get("classname") or "").replace(".", "/") + ".py"
        name = f"{module}::{(case.get('name') or '').split('[')[0]}"
        failure = case.find("failure")
        error = case.find("error")
        if error is not None and "on teardown" not in (error.get("message") or ""):  # a fixture's last claim
            raise AssertionError(f"{name} could not run:\n{done.stdout[-3000:]}")
        message = "" if failure is None else (failure.get("message") or "it failed").splitlines()[0]
        found[name] = found.get(name) or message
    return found


@pytest.fixture(scope="module")
def caught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[dict[str, str]]]]:
    """What each mutation's tests say, two mutations at a time."""
    folder = tmp_path_factory.mktemp("mutations")

    def run(mutation: Mutation, number: int) -> dict[str, str]:
        copy = copy_of_the_package(folder / str(number))
        plant(copy, mutation.edits)
        found: dict[str, str] = {}
        for test in mutation.caught_by:  # alone: what a failed test leaves behind disturbs the next one
            found |= outcomes(copy, [test])
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {m.name: pool.submit(run, m, number) for number, m in enumerate(MUTATIONS)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_defect_is_caught(
    mutation: Mutation, caught: dict[str, Future[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = caught[mutation.name].result()
    with capsys.disabled():
        print(f"\n{mutation.name}")
        for test, message in found.items():
            print(f"    {test}: {message[:150] or 'PASSED'}")
    assert set(found) == set(mutation.caught_by)
    for test, message in found.items():
        is_broken_claim = message.startswith(("AssertionError", "assert", "Failed: DID NOT RAISE"))
        assert is_broken_claim, f"{test} did not catch it: {message or 'it passed'}"


def test_without_a_defect_the_same_tests_pass(tmp_path: Path) -> None:
    tests = list(dict.fromkeys(test for mutation in MUTATIONS for test in mutation.caught_by))
    found = outcomes(copy_of_the_package(tmp_path / "package"), tests)
    assert found == dict.fromkeys(tests, "")


def test_a_planted_defect_must_be_where_it_is_said_to_be(tmp_path: Path) -> None:
    copy = copy_of_the_package(tmp_path / "package")
    for old in ("this is nowhere", "import annotations\n" * 2):
        with pytest.raises(AssertionError, match="0 times"):
            plant(copy, [Edit("core/fold.py", old, "")])
    with pytest.raises(AssertionError, match="times"):
        plant(copy, [Edit("core/fold.py", "return", "")])
