"""What all tests share: seeds, threads, workers, and third-party warnings at import time."""

import contextlib
import gc
import os
import warnings

# The problems are tiny: threads would spend their time waiting for each other. Set before NumPy
# and torch load their libraries, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# The same cases everywhere, however slow the machine.
hypothesis.settings.register_profile("everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("everywhere")

torch.set_num_threads(1)


def pytest_configure(config) -> None:
    """What these packages do when they are first imported is not ours to fail on."""
    if config.getoption("numprocesses", None):  # workers do, and this process runs no test
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("curvlinops", "transformers", "pylops"):
            with contextlib.suppress(ImportError):
                __import__(package)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers take neighbouring tests, which share fixtures and dense matrices; the faster steals.

    Dealt one by one, as by default, these would be made once for every worker.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end: no garbage collection looks at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries report what is left at the very end as leaked


def pytest_collectstart() -> None:
    """What a module draws when it is imported is the same, whichever were imported before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # torch.manual_seed asks every kind of device, for a millisecond
        torch.cuda.manual_seed_all(0)
