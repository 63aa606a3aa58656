"""What every test may rely on: no network, one thread, fixed seeds, a kernel cache that is not the user's."""

import os

# Before the first import of torch and transformers: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before the first import of triton, which torch has not made: it reads this once
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores, and one thread sums in one order. A test of threading sets its own number.
    torch.set_num_threads(1)
    # torch's record of every trace: pytest would keep it all, and print thousands of lines with each failure.
    logging.getLogger("torch.__trace").disabled = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    # xdist gives each worker a folder inside the run's own: one level up, all share what one has built.
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        # Builds are named by what they were made of, so that those of an earlier run, where it kept them, are right.
        patch.setenv("SLIM_CACHE", os.environ.get("SLIM_TEST_CACHE") or str(run / "slim-cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _lift_once() -> Iterator[None]:
    import slim.api
    from tests.lifting import lift_once, lift_path_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slim.api, "lift", lift_once)
        patch.setattr(slim.api, "lift_path", lift_path_once)
        patch.setattr(sys.modules["slim.compiler.lift"], "lift_path", lift_path_once)
        yield


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLIM_CACHE of the test's own, for tests of what is built and what is found again."""
    cache = tmp_path / "slim-cache"
    monkeypatch.setenv("SLIM_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts that lies beside the checkout on the development machines."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the models and texts in {SHARED}, which this machine does not have")
    return SHARED
