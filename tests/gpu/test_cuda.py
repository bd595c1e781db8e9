"""The operator and the SciPy adapter on a CUDA device."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh

from torchlinop import HessianOperator, as_linear_operator
from torchlinop.batches import tree_map
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_hessian

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(problem):
    return gallery.Problem(
        problem.model.cuda(),
        problem.batches,
        problem.loss_fn,
        tree_map(torch.Tensor.cuda, problem.full_batch),
    )


def relative(H, reference):
    return float((H - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("make", [gallery.mlp, gallery.cnn, gallery.gpt2, gallery.recurrent])
@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_products_on_a_gpu_are_those_of_the_dense_hessian(make, linearization):
    p = on_gpu(make())
    expected = dense_hessian(p.full_loss, p.parameters)
    # The batches lie on the CPU: the operator moves them.
    H = HessianOperator(p.model, p.batches, p.loss_fn, linearization=linearization)
    V = H.space.random(5)
    assert V.is_cuda
    assert relative(H @ V, expected @ V) < 1e-11


def test_scipy_drives_an_operator_on_a_gpu():
    p = on_gpu(gallery.mlp())
    A = as_linear_operator(HessianOperator(p.model, p.batches, p.loss_fn))
    values = eigsh(A, 5, which="LA", v0=np.ones(53), return_eigenvectors=False)
    exact = torch.linalg.eigvalsh(dense_hessian(p.full_loss, p.parameters))[-5:]
    np.testing.assert_allclose(np.sort(values), exact.cpu(), rtol=1e-10)


def test_random_states_of_the_gpu_are_left_alone():
    p = on_gpu(gallery.mlp())
    before = torch.cuda.get_rng_state()
    H = HessianOperator(p.model, p.batches, p.loss_fn, mode="train", linearization="rebuild")
    H @ H.space.random(2)
    assert torch.equal(before, torch.cuda.get_rng_state())
