"""EKFAC has K-FAC's eigenvectors, and the GGN's quadratic forms in them as eigenvalues."""

import functools

import pytest
import torch
from torch import nn

from torchlinop.errors import OptionError
from torchlinop.losses import hf_lm_loss_of_output
from torchlinop.operators.fisher import FisherOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.operators.kfac import EKFACOperator, KFACOperator
from torchlinop.testing import architectures, gallery
from torchlinop.testing.dense_kfac import layer_factors
from torchlinop.testing.oracles import (
    class_outcomes,
    curvlinops_ekfac,
    dense_empirical_fisher,
    dense_fisher,
    dense_ggn,
    dense_hessian,
)


def relative(K, reference):
    return float((K - reference).abs().max() / reference.abs().max())


@functools.cache
def problem(name):
    return getattr(gallery, name)()


def criterion_of(name):
    return hf_lm_loss_of_output() if name in ("gpt2", "llama") else problem(name).criterion


def ekfac(name, batches=None, operator=EKFACOperator, **options):
    p = problem(name)
    return operator(p.model, batches or p.batches, p.forward_fn, criterion_of(name), **options)


@functools.cache
def ggn(name):
    """The dense matrix that is approximated."""
    p = problem(name)
    if name not in ("gpt2", "llama"):
        return dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)
    labels = p.full_batch["labels"][:, 1:].flatten()
    return dense_ggn(
        lambda f: nn.functional.cross_entropy(f[:, :-1].flatten(0, 1), labels),
        p.outputs,
        p.parameters,
    )


@functools.cache
def empirical_fisher(name):
    p = problem(name)
    labels = p.full_batch[1].numel()
    count = p.outputs().numel() if isinstance(p.criterion, nn.MSELoss) else labels
    return dense_empirical_fisher(
        lambda: gallery.unreduced(p.criterion, p.outputs(), p.full_batch[1]),
        1 / count,
        p.parameters,
    )


COVERED = [
    "mlp",
    "regression",
    "binary",
    "convolutions",
    "labelled_sequences",
    "real_sequences",
    "reused_module",
    "tied",
    "group_norm",
    "gpt2",
    "llama",
]


def means_over_eigenspaces(values, vectors):
    """The matrix that averages over equal eigenvalues of a factor; unit vectors are no choice."""
    if vectors is None:
        return torch.eye(len(values)).double()
    equal = (values[:, None] - values).abs() < len(values) * 2.2e-16 * values.max()
    return equal.double() / equal.sum(1, keepdim=True)


def eigenvectors(block):
    """Q_L ⊗ Q_R."""
    sides = zip(block.eigenvalues.shape, (block.left, block.right), strict=True)
    return torch.kron(*(torch.eye(d).double() if Q is None else Q.contiguous() for d, Q in sides))


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", COVERED)
def test_the_eigenvalues_are_quadratic_forms_of_the_ggn(name, approximation, separate):
    options = {"approximation": approximation, "separate_weight_and_bias": separate}
    E, K = ekfac(name, **options), ekfac(name, operator=KFACOperator, **options)
    scale = ggn(name).diagonal().max()
    for ours, uncorrected in zip(E.kronecker_blocks, K.kronecker_blocks, strict=True):
        rows = torch.arange(E.size)[ours.entries]
        Q = eigenvectors(ours)
        forms = (Q.T @ ggn(name)[rows][:, rows] @ Q).diagonal().view(ours.eigenvalues.shape)
        assert abs(ours.eigenvalues.sum() - forms.sum()) < 1e-12 * scale * len(rows)
        if uncorrected.factors is not None:  # not of several products
            left, right = uncorrected.factors
            means = means_over_eigenspaces(left, ours.left) @ forms
            means = means @ means_over_eigenspaces(right, ours.right).T
            assert float((ours.eigenvalues - means).abs().max() / scale) < 1e-12


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", ["regression", "labelled_sequences", "real_sequences"])
def test_the_eigenvectors_are_those_of_the_factors_by_their_definition(name, separate):
    # Simple eigenvalues: more samples and positions than inputs, so that A has full rank.
    p = problem(name)
    E = ekfac(name, separate_weight_and_bias=separate)
    block = E.kronecker_blocks[0]
    layer = next(m for m in p.model.modules() if isinstance(m, nn.Linear))
    _, targets = p.full_batch

    def metric(f, n):
        f = f.clone().requires_grad_()
        shape = p.outputs()[n : n + 1].shape
        scale = 1 / len(targets)
        return dense_hessian(lambda: scale * p.criterion(f.view(shape), targets[n : n + 1]), [f])

    factors = layer_factors(p.model, layer, list(p.full_batch[0]), metric, joint=not separate)
    Q = torch.kron(torch.linalg.eigh(factors.B)[1], torch.linalg.eigh(factors.A)[1])
    rows = torch.arange(E.size)[block.entries]
    G = ggn(name)[rows][:, rows]
    reference = (Q * (Q.T @ G @ Q).diagonal()) @ Q.T
    assert relative(E.to_dense()[rows][:, rows], reference) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "regression", "binary", "deep_linear"])
def test_ekfac_equals_curvlinops(name, fisher_type, separate, reduction):
    p = problem(name)
    criterion = type(p.criterion)(reduction=reduction)
    options = {"fisher_type": fisher_type, "separate_weight_and_bias": separate}
    reference = curvlinops_ekfac(p.model, criterion, p.batches, **options)
    E = EKFACOperator(p.model, p.batches, p.forward_fn, criterion, **options)
    assert relative(E.to_dense(), reference) < 1e-12


@pytest.mark.parametrize("name", [*COVERED, "deep_linear", "custom_function"])
def test_the_trace_is_that_of_the_ggn(name):
    E = ekfac(name)
    assert float(E.trace()) == pytest.approx(float(ggn(name).trace()), rel=1e-12)


@pytest.mark.parametrize("name", ["mlp", "regression", "labelled_sequences", "real_sequences"])
def test_the_trace_of_the_empirical_type_is_that_of_the_empirical_fisher(name):
    E = ekfac(name, fisher_type="empirical")
    assert float(E.trace()) == pytest.approx(float(empirical_fisher(name).trace()), rel=1e-12)


def test_the_trace_of_monte_carlo_has_that_of_the_fisher_as_its_expectation():
    p = problem("mlp")
    exact = dense_fisher(
        lambda y: nn.functional.cross_entropy(p.outputs(), y, reduction="none"),
        class_outcomes(p.outputs()),
        1 / 23,
        p.parameters,
    ).trace()
    traces = torch.stack(
        [ekfac("mlp", fisher_type="mc", sampling_seed=s).trace() for s in range(100)]
    )
    assert abs(float((traces.mean() - exact) / (traces.std() / 10))) < 4


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "regression", "labelled_sequences", "real_sequences"])
def test_the_trace_of_monte_carlo_is_that_of_the_fisher_with_the_same_draws(name, draws):
    # The steps of sequences mix: products of different loss terms would show.
    p = problem(name)
    F = FisherOperator(p.model, p.batches, p.forward_fn, p.criterion, mc_samples=draws)
    E = ekfac(name, fisher_type="mc", mc_samples=draws)
    assert float(E.trace()) == pytest.approx(float(F.to_dense().trace()), rel=1e-12)


@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 1, 3), (4, 1)])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_ekfac_does_not_depend_on_batches_where_a_is_rank_deficient(approximation, sizes):
    # Five samples of nine features: the basis of the null space of A is arbitrary.
    torch.manual_seed(3)
    mean = architectures._MeanOverSteps()
    model = nn.Sequential(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3), mean)
    full = (torch.randn(5, 3, 9).double(), torch.randint(0, 3, (5,)))
    one, many = (
        EKFACOperator(
            model.double(),
            batches,
            gallery.of_inputs,
            nn.CrossEntropyLoss(),
            approximation=approximation,
        ).to_dense()
        for batches in ([full], gallery.in_batches(full, *sizes))
    )
    assert relative(many, one) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "convolutions", "gpt2", "tied"])
def test_ekfac_is_the_same_for_any_batches(name):
    E = ekfac(name).to_dense()
    one = ekfac(name, [problem(name).full_batch]).to_dense()
    assert relative(E, one) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "convolutions", "labelled_sequences", "tied", "gpt2"])
def test_ekfac_is_nearer_to_the_ggn_than_kfac(name):
    # In Frobenius norm, where its eigenvalues are the best for the common eigenvectors.
    def distance(block):
        rows = torch.arange(len(ggn(name)))[block.entries]
        G = ggn(name)[rows][:, rows]
        return float((block.matmat(torch.eye(len(rows)).double()) - G).norm())

    ours = [distance(block) for block in ekfac(name).kronecker_blocks]
    theirs = [distance(block) for block in ekfac(name, operator=KFACOperator).kronecker_blocks]
    slack = 1e-12 * float(ggn(name).norm())  # of blocks that are exact in both
    assert all(e <= k + slack for e, k in zip(ours, theirs, strict=True))
    assert sum(ours) < 0.99 * sum(theirs)


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_scalars_and_inverse_are_those_of_the_dense_matrix(name):
    E = ekfac(name)
    dense = E.to_dense()
    V = E.space.random(2, seed=2)
    damped = dense + 0.01 * torch.eye(E.size).double()
    assert relative(E.inverse(0.01) @ V, torch.linalg.solve(damped, V)) < 1e-11
    assert float(E.frobenius_norm()) == pytest.approx(float(dense.norm()), rel=1e-12)
    inverse = E.inverse(0.01)
    exact = -torch.linalg.slogdet(damped).logabsdet
    assert float(inverse.logdet()) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("name", ["mlp", "group_norm"])
def test_there_are_no_factors_to_split_the_damping_between(name):
    with pytest.raises(OptionError, match="two Kronecker factors, which EKFACOperator does not"):
        ekfac(name).inverse(0.1, split="pi")


@pytest.mark.parametrize("unsupported", ["error", "diag"])
def test_forward_only_has_no_second_moments(unsupported):
    with pytest.raises(OptionError, match='EKFAC needs gradients, which fisher_type="forward-o'):
        ekfac("mlp", fisher_type="forward-only", unsupported=unsupported)


def test_masks_of_dropout_are_the_same_in_both_passes():
    # With the same masks as GGNOperator has in train mode.
    p = problem("mlp")
    model = nn.Sequential(p.model[0], nn.Dropout(0.5), *p.model[1:])
    arguments = (model, p.batches, p.forward_fn, p.criterion)
    E = EKFACOperator(*arguments, mode="train", seed=3)
    G = GGNOperator(*arguments, mode="train", seed=3).to_dense()
    assert float(E.trace()) == pytest.approx(float(G.trace()), rel=1e-12)
    assert relative(G, ggn("mlp")) > 0.1


def test_data_that_are_read_again_give_the_same_matrix():
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*problem("mlp").full_batch), batch_size=9
    )
    E = ekfac("mlp", loader, pin_data=False)
    assert relative(E.to_dense(), ekfac("mlp").to_dense()) < 1e-12


def test_checkpointed_layers_are_seen_once():
    p = problem("checkpointed")
    E = ekfac("checkpointed")
    plain = nn.Sequential(p.model.first, nn.Tanh(), p.model.second)
    same = EKFACOperator(plain, p.batches, p.forward_fn, p.criterion)
    assert relative(E.to_dense(), same.to_dense()) < 1e-12


def test_the_rest_is_the_diagonal_of_the_ggn():
    E = ekfac("attention", unsupported="diag")
    assert float(E.trace()) == pytest.approx(float(ggn("attention").trace()), rel=1e-12)
    assert relative(E.to_dense()[:80, :80], ggn("attention").diagonal()[:80].diag()) < 1e-12
