"""What all tests share: seeds, threads, and third-party warnings at import time."""

import warnings

import hypothesis
import pytest
import torch

with warnings.catch_warnings():
    # What these packages do when they are first imported is not ours to fail on.
    warnings.simplefilter("ignore")
    for package in ("curvlinops", "transformers", "pylops"):
        try:
            __import__(package)
        except ImportError:
            continue

# The same cases everywhere, however slow the machine.
hypothesis.settings.register_profile("everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("everywhere")

# The problems are tiny: threads would spend their time waiting for each other.
torch.set_num_threads(1)


def pytest_collectstart() -> None:
    """What a module draws when it is imported is the same, whichever were imported before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)
