"""Settings and data that tests of every tier share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# One thread a process, decided before torch is imported: the tests' models are too small to gain
# from more, and several processes on few cores would wait for one another. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import registered, warm
from tests.helpers.commands import flite
from tests.helpers.toy import preprocess_args, write_text

# No deadline: on a busy machine a slow example is no fault. Derandomised: always the same tests.
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_collection_finish() -> None:
    """What one module of tests registers when it is imported, all others would find."""
    if found := registered.of_tests():
        raise pytest.UsageError(f"registered for every test: {'; '.join(found)}")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of toy sentences (200 / 20 / 20), made by flite-preprocess."""
    folder = tmp_path_factory.mktemp("toy")
    text = write_text(folder / "text", {"train": 200, "valid": 20, "test": 20})
    assert flite("preprocess", *preprocess_args(text, folder / "data-bin")) == 0
    return folder / "data-bin"


@pytest.fixture(scope="module", autouse=True)
def _no_plugin_left_behind() -> Iterator[None]:
    """Modules of tests find the same names in any order, and on any worker."""
    with registered.plugins_forgotten():
        yield


@pytest.fixture(scope="session", autouse=True)
def _warm_ranks() -> Iterator[None]:
    """Ranks of tests need not import torch each."""
    with warm.warm_ranks():
        yield


@pytest.fixture
def cold_ranks() -> Iterator[None]:
    """Ranks start as a user's do."""
    with warm.cold_ranks():
        yield


@pytest.fixture(autouse=True)
def _no_group_left_behind() -> Iterator[None]:
    """A test that formed a group of processes in this one does not leave it to the next."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
