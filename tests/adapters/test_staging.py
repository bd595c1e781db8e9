"""Vectors between SciPy and a GPU: once through page-locked memory, and there when it matters."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchlinop.adapters import dlpack
from torchlinop.adapters.dlpack import array_of, tensor_of

GPU = torch.device("cuda:0")


@pytest.fixture
def log(monkeypatch):
    """What happens, in order, on a device that is the CPU."""
    events = []
    stream = SimpleNamespace(synchronize=lambda: events.append("synchronize"))
    monkeypatch.setattr(
        dlpack, "staging_like", lambda t: events.append("stage") or torch.empty_like(t)
    )
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *where, **how: events.append(("to", how)) or t
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return events


@pytest.mark.parametrize("order", ["C", "F"])
def test_vector_of_a_solver_has_been_read_when_its_transfer_begins(log, order):
    x = np.arange(12.0).reshape(4, 3).copy(order)
    t = tensor_of(x, torch.float64, GPU)
    x.fill(np.nan)
    np.testing.assert_array_equal(t.numpy(), np.arange(12.0).reshape(4, 3))
    assert log[:2] == ["stage", ("to", {"non_blocking": True})]


@pytest.mark.parametrize("arrange", [lambda y: y, lambda y: y.mT, lambda y: y[:, 1:]])
def test_product_has_arrived_when_the_solver_gets_it(log, arrange):
    y = arrange(torch.arange(12.0).reshape(4, 3))
    array = array_of(y)
    assert log == ["stage", "synchronize"]
    assert not np.shares_memory(array, y.numpy())
    assert array.flags.c_contiguous or array.flags.f_contiguous
    np.testing.assert_array_equal(array, y.numpy())
