"""The device the tests of this folder run on.

It is CUDA device 0; without one they are skipped. With TORCHLINOP_TEST_DEVICE=cpu, those that ask
nothing of CUDA itself run on the CPU, for whoever writes them without a GPU at hand:

    TORCHLINOP_TEST_DEVICE=cpu TRITON_INTERPRET=1 python -m pytest tests/gpu
"""

import copy
import os

import pytest
import torch

from torchlinop.batches import tree_map

DEVICE = torch.device(os.environ.get("TORCHLINOP_TEST_DEVICE", "cuda:0"))
HAS_CUDA = torch.cuda.is_available()

anywhere = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not HAS_CUDA, reason="needs a CUDA device"),
]
only_cuda = pytest.mark.skipif(DEVICE.type != "cuda" or not HAS_CUDA, reason="needs a CUDA device")


def moved(problem, dtype=torch.float64, device=DEVICE):
    """Model and all data in this dtype on the device, copies: one stays behind as the oracle."""

    def there(t):
        return t.to(device, dtype if t.is_floating_point() else None)

    return type(problem)(
        copy.deepcopy(problem.model).to(device, dtype),
        tree_map(there, problem.batches),
        problem.loss_fn,
        tree_map(there, problem.full_batch),
        problem.forward_fn,
        copy.deepcopy(problem.criterion).to(device),
    )


def relative(found, exact):
    """The largest error, relative to the largest entry of the exact answer, wherever they are."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    return float((found - exact).abs().max() / exact.abs().max())
