"""Specs as users write them, in files of their own."""

import uuid

import pytest

BEFORE = """
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchlinop.testing import gallery

"""

MLP = """
def build():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, [(torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in (9, 5)], LOSS
"""


@pytest.fixture
def spec(tmp_path):
    """A function: the source of a module to the spec of its build()."""

    def written(source):
        path = tmp_path / f"model_{uuid.uuid4().hex}.py"
        path.write_text(BEFORE + source)
        return f"{path}:build"

    return written


@pytest.fixture
def mlp(spec):
    """The spec of a small network, with a loss of torch, which gives all matrices."""
    return spec(MLP.replace("LOSS", "nn.CrossEntropyLoss()"))
