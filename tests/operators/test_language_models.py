"""GPT-2 and Llama as they come: padded ragged batches, tied heads, default attention, -100."""

import functools
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F

from torchlinop import HessianOperator, match_names
from torchlinop.losses import hf_lm_forward, hf_lm_loss, hf_lm_loss_of_output
from torchlinop.operators.empirical_fisher import EmpiricalFisherOperator
from torchlinop.operators.fisher import FisherOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_empirical_fisher, dense_ggn

MODELS = {"gpt2": gallery.gpt2, "llama": gallery.llama}
ATTENTION = {"gpt2": match_names("*.attn.*"), "llama": match_names("*.self_attn.*")}


@functools.cache
def problem(name):
    return MODELS[name]()


def relative(A, reference):
    return float((A - reference).abs().max() / reference.abs().max())


def token_losses(name, logits):
    """The cross-entropy of every next token, masked or not: (N (T - 1),), and which count."""
    labels = problem(name).full_batch["labels"][:, 1:].flatten()
    logits = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels, reduction="none"), labels != -100


def loss_of(name, logits):
    losses, counted = token_losses(name, logits)
    return losses.sum() / counted.sum()


@functools.cache
def ggn(name):
    p = problem(name)
    return dense_ggn(functools.partial(loss_of, name), p.outputs, p.parameters)


@functools.cache
def empirical_fisher(name):
    p = problem(name)
    _, counted = token_losses(name, p.outputs())

    def terms():
        return token_losses(name, p.outputs())[0][counted]

    return dense_empirical_fisher(terms, 1 / int(counted.sum()), p.parameters)


# The Fisher matrix of cross-entropy is the GGN.
MATRICES = {
    "GGN": (GGNOperator, ggn),
    "Fisher": (FisherOperator, ggn),
    "empirical Fisher": (EmpiricalFisherOperator, empirical_fisher),
}


def operator(matrix, name, batches=None, **options):
    p = problem(name)
    build = MATRICES[matrix][0]
    data = p.batches if batches is None else batches
    return build(p.model, data, hf_lm_forward(), hf_lm_loss_of_output(), **options)


BATCHINGS = {
    "one batch": lambda p: ([p.full_batch], {}),
    "ragged batches": lambda p: (p.batches, {}),
    "microbatches": lambda p: ([p.full_batch], {"microbatch_size": 4}),
    "UserDict": lambda p: ([UserDict(batch) for batch in p.batches], {}),
}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", MODELS)
def test_products_equal_those_of_the_dense_matrix(name, matrix, batching):
    batches, options = BATCHINGS[batching](problem(name))
    A = operator(matrix, name, batches, **options)
    truth = MATRICES[matrix][1](name)
    V = A.space.random(6, seed=1)
    assert relative(A @ V, truth @ V) < 1e-12
    assert relative(A @ V[:, 0], truth @ V[:, 0]) < 1e-12


@pytest.mark.parametrize("method", ["forward_over_reverse", "finite_difference"])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", MODELS)
def test_products_by_other_derivatives_equal_those_of_the_dense_matrix(name, matrix, method):
    A = operator(matrix, name, method=method)
    truth = MATRICES[matrix][1](name)
    V = A.space.random(3, seed=1)
    # Central differences err by u^(2/3) = 4e-11 times the ratio of third to first derivatives:
    # LayerNorm of embeddings of size 0.02 makes it 1 / 0.02^2.
    tolerance = 1e-12 if method == "forward_over_reverse" else 1e-7
    assert relative(A @ V, truth @ V) < tolerance


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", MODELS)
def test_the_attention_layers_alone_are_their_diagonal_block(name, matrix):
    A = operator(matrix, name, param_filter=ATTENTION[name])
    layout = HessianOperator(problem(name).model, problem(name).batches, gallery.next_token_loss)
    slots = layout.layout.restrict(ATTENTION[name])
    rows = torch.cat([torch.arange(slot.offset, slot.stop) for slot in slots])
    block = MATRICES[matrix][1](name)[rows][:, rows]
    assert A.layout.names == tuple(slot.name for slot in slots)
    assert all("attn" in name for name in A.layout.names)
    assert relative(A.to_dense(), block) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_a_tied_head_has_one_slot(name):
    layout = operator("GGN", name).layout
    assert len(layout.aliases) == (1 if name == "gpt2" else 0)  # Llama's is not tied
    assert layout.size == sum(p.numel() for p in problem(name).model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_monte_carlo_fisher_does_not_depend_on_the_batching(name):
    whole = operator("Fisher", name, [problem(name).full_batch], mc_samples=2)
    ragged = operator("Fisher", name, mc_samples=2)
    V = whole.space.random(3)
    assert relative(ragged @ V, whole @ V) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_logits_is_the_loss_that_hugging_face_computes(name):
    p = MODELS[name](torch.float32)
    for batch in [*p.batches, p.full_batch]:
        theirs = hf_lm_loss()(p.model, batch).detach()
        ours = hf_lm_loss_of_output()(hf_lm_forward()(p.model, batch), batch).detach()
        assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_weighted_by_their_unmasked_next_tokens(name):
    G = operator("GGN", name)
    whole = problem(name).full_loss().detach()
    assert float(G.loss()) == pytest.approx(float(whole), rel=1e-12)
    shares = [share for _, share in G.objective.data]
    counted = [int((batch["labels"][:, 1:] != -100).sum()) for batch in problem(name).batches]
    assert shares == pytest.approx([count / sum(counted) for count in counted])


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_loss_of_hugging_face(name):
    p = MODELS[name](torch.float32)
    G = GGNOperator(p.model, p.batches, hf_lm_forward(), hf_lm_loss_of_output())
    H = HessianOperator(p.model, p.batches, hf_lm_loss())
    assert relative(G.gradient(), H.gradient()) < 1e-5
