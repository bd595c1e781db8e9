"""K-FAC is what its definition says, written out in loops over samples and positions."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop import counter_random, match_names
from torchlinop.errors import (
    BatchError,
    KFACCoverageError,
    NonFiniteError,
    OptionError,
    ParameterError,
    SampleMixingError,
    UnusedParameterWarning,
)
from torchlinop.losses import CrossEntropy, MeanSquaredError, hf_lm_loss_of_output
from torchlinop.operators.kfac import EKFACOperator, KFACOperator, tape
from torchlinop.operators.kronecker import KroneckerOperator
from torchlinop.testing import architectures, gallery
from torchlinop.testing.dense_kfac import dense_kfac, layer_factors
from torchlinop.testing.oracles import curvlinops_kfac, dense_ggn, dense_hessian


def relative(K, reference):
    return float((K - reference).abs().max() / reference.abs().max())


@functools.cache
def problem(name):
    return getattr(gallery, name)()


def kfac(p, batches=None, criterion=None, operator=KFACOperator, **options):
    batches = p.batches if batches is None else batches
    return operator(p.model, batches, p.forward_fn, criterion or p.criterion, **options)


def samples_of(p):
    return list(p.full_batch[0])


def loss_hessians(p):
    """M_n, the Hessian of the whole loss with respect to the outputs of sample n."""
    _, targets = p.full_batch
    share = 1 / len(targets) if p.criterion.reduction == "mean" else 1

    def metric(f, n):
        shape = p.outputs()[n : n + 1].shape
        f = f.clone().requires_grad_()
        loss = p.criterion
        return dense_hessian(lambda: share * loss(f.view(shape), targets[n : n + 1]), [f])

    return metric


def term_gradients(p):
    """M_n, the sum over the loss terms of sample n of outer products of their gradients."""
    _, targets = p.full_batch
    terms = p.outputs().numel() if isinstance(p.criterion, nn.MSELoss) else targets.numel()

    def metric(f, n):
        f = f.clone().requires_grad_()
        outputs = f.view(p.outputs()[n : n + 1].shape)
        total = torch.zeros(len(f), len(f), dtype=f.dtype)
        for loss in gallery.unreduced(p.criterion, outputs, targets[n : n + 1]):
            (g,) = torch.autograd.grad(loss, f, retain_graph=True)
            total += torch.outer(g, g) / terms
        return total

    return metric


METRICS = {"type-2": loss_hessians, "empirical": term_gradients}
BATCHINGS = {
    "one batch": lambda p: ([p.full_batch], {}),
    "ragged batches": lambda p: (p.batches, {}),
    "microbatches": lambda p: ([p.full_batch], {"microbatch_size": 2}),
}


@functools.cache
def definition(name, fisher_type, reduce, joint):
    """One dense matrix for all batchings."""
    p = problem(name)
    metric = METRICS[fisher_type](p)
    return dense_kfac(p.model, samples_of(p), metric, reduce=reduce, joint=joint)


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", METRICS)
@pytest.mark.parametrize(
    "name",
    ["mlp", "regression", "convolutions", "labelled_sequences", "real_sequences", "reused_module"],
)
def test_kfac_is_its_definition(name, fisher_type, approximation, separate, batching):
    p = problem(name)
    batches, options = BATCHINGS[batching](p)
    K = kfac(
        p,
        batches,
        fisher_type=fisher_type,
        approximation=approximation,
        separate_weight_and_bias=separate,
        **options,
    )
    reference = definition(name, fisher_type, approximation == "reduce", not separate)
    assert relative(K.to_dense(), reference) < 1e-12


@pytest.mark.parametrize("pin_data", [True, False])
@pytest.mark.parametrize("operator", [KFACOperator, EKFACOperator])
def test_samples_without_a_loss_term_count_the_same_in_a_batch_of_their_own(operator, pin_data):
    p = gallery.masked_labels()
    one = kfac(p, [p.full_batch], operator=operator).to_dense()
    for size in (None, 1):
        K = kfac(p, operator=operator, pin_data=pin_data, microbatch_size=size)
        assert relative(K.to_dense(), one) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("name", ["mlp", "regression", "binary", "deep_linear"])
def test_kfac_equals_curvlinops(name, fisher_type, approximation, separate, reduction):
    p = problem(name)
    criterion = type(p.criterion)(reduction=reduction)
    options = {
        "fisher_type": fisher_type,
        "separate_weight_and_bias": separate,
    }
    reference = curvlinops_kfac(p.model, criterion, p.batches, kfac_approx=approximation, **options)
    K = kfac(p, criterion=criterion, approximation=approximation, **options)
    assert relative(K.to_dense(), reference) < 1e-12


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_kfac_of_a_convolution_with_zero_padding_equals_curvlinops(approximation):
    model = nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=1, dilation=(1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 4 * 2, 3),
    ).double()
    data = [(torch.randn(n, 2, 4, 4).double(), torch.randint(0, 3, (n,))) for n in (4, 3)]
    reference = curvlinops_kfac(model, nn.CrossEntropyLoss(), data, kfac_approx=approximation)
    K = KFACOperator(
        model, data, gallery.of_inputs, nn.CrossEntropyLoss(), approximation=approximation
    )
    assert relative(K.to_dense(), reference) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "regression", "labelled_sequences", "convolutions"])
def test_monte_carlo_uses_the_gradients_of_pinned_targets(name):
    p = problem(name)
    f = p.outputs().detach()
    loss = CrossEntropy() if isinstance(p.criterion, nn.CrossEntropyLoss) else MeanSquaredError()
    G = []
    for m in range(3):
        draw = functools.partial(
            counter_random.uniform, seed=5, stream=m, first=0, device=torch.device("cpu")
        )
        terms = loss.sampled(f, p.full_batch, draw)
        g = terms.gradients * (terms.weights / 3).sqrt()
        steps = torch.eye(g.shape[2]) if name == "labelled_sequences" else [1]
        G += [(g * step).flatten(1) for step in steps]  # one loss term of each sample
    reference = dense_kfac(
        p.model, samples_of(p), lambda f, n: sum(torch.outer(g[n], g[n]) for g in G)
    )
    K = kfac(p, fisher_type="mc", mc_samples=3, sampling_seed=5)
    assert relative(K.to_dense(), reference) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "labelled_sequences", "gpt2"])
def test_what_is_drawn_does_not_depend_on_the_batches(name):
    p = problem(name)
    criterion = hf_lm_loss_of_output() if name == "gpt2" else p.criterion
    one = kfac(p, [p.full_batch], criterion, fisher_type="mc", mc_samples=2)
    many = kfac(p, p.batches, criterion, fisher_type="mc", mc_samples=2)
    assert relative(many.to_dense(), one.to_dense()) < 1e-12


@pytest.mark.parametrize("name", ["labelled_sequences", "real_sequences"])
def test_type_2_is_the_expectation_of_monte_carlo_for_sequences_whose_steps_mix(name):
    # K-FAC's A is the same for all, so entries are linear in B: each is a mean of 200 draws.
    p = problem(name)
    exact = kfac(p).to_dense()
    draws = torch.stack(
        [kfac(p, [p.full_batch], fisher_type="mc", sampling_seed=s).to_dense() for s in range(200)]
    )
    error = (draws.mean(0) - exact)[exact != 0]
    deviation = draws.std(0)[exact != 0] / 200**0.5
    z = error / deviation
    # About 600 entries; those of one block depend on each other.
    assert float(z.abs().max()) < 5
    assert float(z.square().mean()) < 3


@pytest.mark.parametrize("name", ["mlp", "regression", "binary"])
def test_jointly_kfac_of_one_sample_is_the_ggn_of_every_layer(name):
    p = problem(name)
    one = [tuple(t[:1] for t in p.full_batch)]
    K = kfac(p, one, separate_weight_and_bias=False).to_dense()
    G = dense_ggn(lambda f: p.criterion(f, one[0][1]), lambda: p.model(one[0][0]), p.parameters)
    for slots in ((0, 2), (2, 4)):
        sizes = [sum(q.numel() for q in p.parameters[:i]) for i in slots]
        block = slice(*sizes)
        assert relative(K[block, block], G[block, block]) < 1e-12


@pytest.mark.parametrize("batching", BATCHINGS)
def test_kfac_is_exact_for_deep_linear_networks_and_squared_errors(batching):
    p = problem("deep_linear")
    batches, options = BATCHINGS[batching](p)
    K = kfac(p, batches, **options).to_dense()
    G = dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)
    start = 0
    for parameter in p.parameters:
        block = slice(start, start + parameter.numel())
        assert relative(K[block, block], G[block, block]) < 1e-12
        start = block.stop


class Untied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed, self.mix = tied.embed, tied.mix
        self.head = nn.Linear(4, 7, bias=False).double()
        self.head.weight = nn.Parameter(tied.head.weight.detach().clone())

    forward = architectures._Tied.forward


def products_of_both_uses(options):
    """The blocks of the embedding and of the head, as if they were not tied."""
    p = problem("tied")
    K = KFACOperator(Untied(p.model), p.batches, p.forward_fn, p.criterion, **options).to_dense()
    return K[:28, :28], K[-28:, -28:]


def test_a_tied_weight_gets_the_sum_of_its_products_where_their_factors_commute():
    # diag(counts) ⊗ I for the embedding, I ⊗ A for the head.
    p = problem("tied")
    K = kfac(p, fisher_type="forward-only").to_dense()[:28, :28]
    tokens = p.full_batch[0]
    counts = torch.bincount(tokens, minlength=7).double() / 7
    hidden = torch.tanh(p.model.mix(p.model.embed(tokens))).detach()
    A = hidden.T @ hidden / 7
    I_7, I_4 = torch.eye(7).double(), torch.eye(4).double()
    assert relative(K, torch.kron(counts.diag(), I_4) + torch.kron(I_7, A)) < 1e-12


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_a_tied_weight_gets_a_projection_of_the_sum_that_keeps_trace_and_positivity(fisher_type):
    p = problem("tied")
    K = kfac(p, fisher_type=fisher_type)
    block = next(b for b in K.kronecker_blocks if b.eigenvalues.shape == (7, 4))
    total = sum(products_of_both_uses({"fisher_type": fisher_type}))
    Q = torch.kron(block.left, block.right)
    assert relative(block.eigenvalues.flatten(), (Q.T @ total @ Q).diagonal()) < 1e-12
    assert float(block.eigenvalues.sum()) == pytest.approx(float(total.trace()), rel=1e-12)
    assert block.eigenvalues.min() >= 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_language_models_are_covered_altogether(name, fisher_type):
    p = problem(name)
    K = kfac(p, criterion=hf_lm_loss_of_output(), fisher_type=fisher_type)
    assert K.coverage.percent == 100
    assert K.coverage.tensors == len(K.layout.slots)
    assert not K.coverage.missing
    assert "covers 100 %" in repr(K.coverage)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_does_not_change_the_matrix(name, approximation):
    # Every row alone, without its padding, against all of them padded to seven tokens.
    p = problem(name)
    lengths = p.full_batch["attention_mask"].sum(1).tolist()
    alone = [
        {key: t[n : n + 1, :length] for key, t in p.full_batch.items()}
        for n, length in enumerate(lengths)
    ]
    criterion = hf_lm_loss_of_output()
    K = kfac(p, alone, criterion, approximation=approximation)
    padded = kfac(p, [p.full_batch], criterion, approximation=approximation)
    assert relative(padded.to_dense(), K.to_dense()) < 1e-12


def test_outputs_with_a_row_a_token_give_the_same_matrix():
    p = problem("labelled_sequences")

    def tokens_in_rows(model, batch):
        return model(batch[0]).mT.flatten(0, 1)  # (N, C, T) to (N T, C)

    flat = CrossEntropy(targets=lambda batch: batch[1].flatten())
    K = KFACOperator(p.model, p.batches, tokens_in_rows, flat)
    assert relative(K.to_dense(), kfac(p).to_dense()) < 1e-12


def test_layers_applied_to_tokens_in_rows_give_the_same_matrix():
    p = problem("real_sequences")

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.across, self.head = p.model.inner, p.model.across, p.model.head

        def forward(self, x):
            hidden = torch.tanh(self.inner(x.flatten(0, 1))).unflatten(0, x.shape[:2])
            return self.head(torch.tanh(self.across(hidden.mT)).mT)

    K = KFACOperator(Rows(), p.batches, p.forward_fn, p.criterion)
    assert relative(K.to_dense(), kfac(p).to_dense()) < 1e-12


def test_vectors_are_backpropagated_one_by_one_where_no_batch_can_be(monkeypatch, caplog):
    expected = kfac(problem("mlp")).to_dense()
    together = torch.autograd.grad

    def grad(*args, is_grads_batched=False, **options):
        if is_grads_batched:
            raise RuntimeError("no batching rule")
        return together(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with caplog.at_level("INFO", "torchlinop"):
        K = kfac(problem("mlp"))
    assert "vectors are backpropagated one by one: no batching rule" in caplog.text
    assert relative(K.to_dense(), expected) < 1e-14


class Normalised(nn.Module):
    def __init__(self, norm, axis):
        super().__init__()
        self.norm, self.head, self.axis = norm, nn.Linear(4, 3), axis

    def forward(self, x):
        return self.head(torch.tanh(self.norm(x)).movedim(self.axis, -1).mean(1))


def rms_norm_of_llama():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(4)


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), (6, 5, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (6, 5, 4)),
    "LlamaRMSNorm": (rms_norm_of_llama, (6, 5, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (6, 4, 5)),
    "BatchNorm": (lambda: nn.BatchNorm1d(4), (6, 4, 5)),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalisations_have_their_exact_block(name):
    build, shape = NORMS[name]
    model = Normalised(build(), 2 if shape[2] == 4 else 1)
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    # Llama's own computes in float32 whatever the dtype.
    dtype, tolerance = (torch.float32, 1e-5) if name == "LlamaRMSNorm" else (torch.float64, 1e-12)
    model.to(dtype).eval()
    x, y = torch.randn(shape, dtype=dtype), torch.randint(0, 3, (6,))
    K = KFACOperator(
        model, [(x[:4], y[:4]), (x[4:], y[4:])], gallery.of_inputs, nn.CrossEntropyLoss()
    )
    own = list(model.norm.parameters())
    n = sum(p.numel() for p in own)
    G = dense_ggn(lambda f: F.cross_entropy(f, y), lambda: model(x), own)
    assert relative(K.to_dense()[:n, :n], G) < tolerance


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_an_embedding_counts_its_rows_and_leaves_padding_out(padding_idx):
    model = nn.Sequential(
        nn.Embedding(5, 3, padding_idx=padding_idx), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    nn.init.normal_(model[0].weight)
    tokens, y = torch.randint(0, 5, (6, 4)), torch.randint(0, 3, (6,))
    K = KFACOperator(model, [(tokens, y)], gallery.of_inputs, nn.CrossEntropyLoss())
    seen = tokens[tokens != padding_idx] if padding_idx is not None else tokens.flatten()
    A = torch.bincount(seen, minlength=5).double() / len(seen)
    P = model(tokens).softmax(1).detach()
    W = model[2].weight.detach().view(3, 4, 3)  # class, position, embedding
    B = torch.zeros(3, 3).double()
    for n in range(6):
        H = (P[n].diag() - torch.outer(P[n], P[n])) / 6
        for s in range(4):
            if tokens[n, s] != padding_idx:
                B += W[:, s].T @ H @ W[:, s]
    assert relative(K.to_dense()[:15, :15], torch.kron(A.diag(), B)) < 1e-12


class Positions(nn.Module):
    """Learned positions, looked up without a sample axis or with one of length one."""

    def __init__(self, one_row):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(5, 3), nn.Embedding(4, 3)
        self.head, self.one_row = nn.Linear(3, 2), one_row

    def forward(self, tokens):
        ids = torch.arange(tokens.shape[1])
        x = self.tokens(tokens) + self.positions(ids[None] if self.one_row else ids)
        return self.head(torch.tanh(x).mean(1))


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (1, 4, 1), (6,)])  # of batches; 4 steps
@pytest.mark.parametrize("one_row", [True, False])
def test_positions_looked_up_once_count_for_every_sample(one_row, sizes):
    model = Positions(one_row).double()
    tokens, y = torch.randint(0, 5, (6, 4)), torch.randint(0, 2, (6,))
    data = gallery.in_batches((tokens, y), *sizes)
    K = KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss()).to_dense()
    x = torch.tanh(model.tokens(tokens) + model.positions.weight).detach()
    P, W = model.head(x.mean(1)).softmax(1).detach(), model.head.weight.detach()
    B = torch.zeros(3, 3).double()
    for n in range(6):
        H = (P[n].diag() - torch.outer(P[n], P[n])) / 6
        for s in range(4):
            J = W * (1 - x[n, s] ** 2) / 4
            B += J.T @ H @ J
    block = torch.kron(torch.eye(4).double() / 4, B)
    assert relative(K[15:27, 15:27], block) < 1e-12


def test_operations_in_place_change_nothing():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)]
    model = nn.Sequential(*layers).double()
    data = [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))]
    K = KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())
    model[1].inplace = False
    same = KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())
    assert torch.equal(K.to_dense(), same.to_dense())


@pytest.mark.parametrize("operator", [KFACOperator, EKFACOperator])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "gpt2", "group_norm"])
def test_kfac_in_float32_is_that_in_float64(name, operator):
    p, narrow = problem(name), getattr(gallery, name)(dtype=torch.float32)
    narrow.model.load_state_dict({k: t.float() for k, t in p.model.state_dict().items()})
    wide = copy.deepcopy(narrow.model).double()
    criterion = hf_lm_loss_of_output() if name == "gpt2" else p.criterion
    K = kfac(narrow, criterion=criterion, operator=operator)
    batches = [
        dict(b.items()) if isinstance(b, dict) else (b[0].double(), b[1]) for b in narrow.batches
    ]
    reference = operator(wide, batches, p.forward_fn, criterion)
    assert relative(K.to_dense(), reference.to_dense()) < 1e-5


def test_a_filter_gives_the_blocks_of_the_selected_parameters():
    p = problem("mlp")
    K = kfac(p, param_filter=match_names("*.weight"))
    whole = kfac(p).to_dense()
    keep = torch.cat([torch.arange(30), torch.arange(35, 50)])
    assert relative(K.to_dense(), whole[keep][:, keep]) < 1e-14


def test_a_joint_block_needs_both_parameters():
    p = problem("mlp")
    K = kfac(p, param_filter=match_names("0.weight", "2.*"), separate_weight_and_bias=False)
    factors = layer_factors(p.model, p.model[0], samples_of(p), loss_hessians(p))
    assert relative(K.to_dense()[:30, :30], torch.kron(factors.B, factors.A)) < 1e-12


@pytest.mark.parametrize("name", ["attention", "weight_norm"])
def test_the_diagonal_of_what_has_no_rule_is_that_of_the_ggn(name):
    p = problem(name)
    K = kfac(p, unsupported="diag")
    G = dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)
    rows = torch.cat(
        [
            torch.arange(s.offset, s.stop)
            for s in K.layout.slots
            if any(s.name in missing for missing in K.coverage.missing)
        ]
    )
    assert relative(K.to_dense()[rows[:, None], rows], G.diagonal()[rows].diag()) < 1e-12


def test_the_empirical_diagonal_is_that_of_the_empirical_fisher():
    p = problem("attention")
    K = kfac(p, unsupported="diag", fisher_type="empirical")
    losses = gallery.unreduced(p.criterion, p.outputs(), p.full_batch[1])
    rows = [torch.autograd.grad(loss, p.parameters, retain_graph=True) for loss in losses]
    G = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    reference = G.square().mean(0)[:80]
    assert relative(K.to_dense().diagonal()[:80], reference) < 1e-12


@pytest.mark.parametrize(("unsupported", "value"), [("identity", 1.0), ("skip", 0.0)])
def test_what_has_no_rule_becomes_a_multiple_of_the_identity(unsupported, value):
    p = problem("attention")
    K = kfac(p, unsupported=unsupported)
    assert torch.equal(K.to_dense()[:80, :80], value * torch.eye(80).double())
    assert "in_proj_weight (no K-FAC rule for MultiheadAttention)" in repr(K.coverage)


def test_what_has_no_rule_is_listed_and_refused():
    p = problem("attention")
    message = (
        r"K-FAC covers 15 % of the 95 entries; not covered: MultiheadAttention "
        r"attention.in_proj_weight \(no K-FAC rule for MultiheadAttention\), .*"
        r"attention.out_proj.weight \(used without calling its layer\), .*"
        r'Choose unsupported="diag", "identity" or "skip".'
    )
    with pytest.raises(KFACCoverageError, match=message):
        kfac(p)


class AlsoElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)

    def forward(self, tokens):
        return F.linear(torch.tanh(self.embed(tokens)), self.embed.weight)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight) + self.bias


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.movedim(1, 0))).mean(0))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (AlsoElsewhere(), None, r"Embedding embed.weight \(also used outside of its layer, or"),
        (
            nn.Sequential(ScaledLinear(3, 2)),
            (6, 3),
            r"covers 25 % .*ScaledLinear 0.weight \(.*or its layer computes something else than "
            r"its class says\)\. Choose",
        ),
        (TimeFirst(), (6, 6, 3), r"inner.weight \(the rows of its layer are not those of the samp"),
        (TimeFirst(), (6, 5, 3), r"inner.weight \(the input of its layer does not begin with"),
    ],
)
def test_layers_that_do_not_explain_the_gradient_are_not_covered(model, shape, message):
    x = torch.randint(0, 7, (6,)) if shape is None else torch.randn(shape)
    data = [(x, torch.randint(0, 2, (6,)))]
    with pytest.raises(KFACCoverageError, match=message):
        KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())


class CausalConv(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class GatedLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x, gate):
        return self.weight * F.layer_norm(x, (3,)) * gate


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = GatedLayerNorm(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.norm(x, x.sigmoid()))


class OtherConv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 2))

    def forward(self, x):
        return F.conv1d(x, self.weight)


class PartOfInput(nn.Linear):
    def forward(self, x):
        return F.linear(x[:, : self.in_features], self.weight, self.bias)


class ChannelsLast(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.mT).mT


def before_a_head(layer, features):
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 2))


@pytest.mark.parametrize(
    ("model", "shape", "name"),
    [
        (before_a_head(CausalConv(3, 4, 3), 24), (5, 3, 6), "CausalConv 0.weight"),
        (Gated(), (5, 3), "GatedLayerNorm norm.weight"),
        (before_a_head(OtherConv1D(), 20), (5, 3, 6), "OtherConv1D 0.weight"),
        (before_a_head(PartOfInput(3, 4), 4), (5, 6), "PartOfInput 0.weight"),
        (before_a_head(ChannelsLast(3), 18), (5, 3, 6), "ChannelsLast 0.weight"),
    ],
)
def test_layers_that_compute_something_else_than_their_class_says_are_not_covered(
    model, shape, name
):
    data = [(torch.randn(shape), torch.randint(0, 2, (5,)))]
    reason = rf"{name} \(its layer computes something else than its class says\)"
    with pytest.raises(KFACCoverageError, match=reason):
        KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())
    K = KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss(), unsupported="diag")
    assert any(name in missing for missing in K.coverage.missing)


class Sets(nn.Module):
    """Rows of all samples one after another, as many of each as it has members."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, mask):
        h = torch.tanh(self.inner(x[mask]))
        sums = h.new_zeros(len(x), 5).index_add(0, mask.nonzero()[:, 0], h)
        return self.head(sums)


def sets(*members):
    mask = torch.arange(3) < torch.tensor(members)[:, None]
    return torch.randn(len(members), 3, 4), mask, torch.randint(0, 3, (len(members),))


@pytest.mark.parametrize(
    "batches", [[(2, 3, 1)], [(3, 3), (3, 1)], [(2, 2, 2, 3, 1, 2)], [(2, 2, 2, 2), (2, 2, 3, 1)]]
)
def test_rows_that_belong_to_other_samples_are_not_covered(batches):
    data = [sets(*members) for members in batches]
    loss = CrossEntropy(targets=lambda batch: batch[2])
    message = r"Linear inner.weight \(the rows of its layer are not those of the samples"
    with pytest.raises(KFACCoverageError, match=message):
        KFACOperator(Sets(), data, lambda model, batch: model(*batch[:2]), loss)


def test_outputs_in_rows_of_ragged_samples_are_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    mask = torch.arange(3) < torch.tensor([3, 1])[:, None]  # four rows of two samples
    data = [(torch.randn(2, 3, 4), mask, torch.randint(0, 3, (2, 3)))]
    loss = CrossEntropy(targets=lambda batch: batch[2][batch[1]])
    with pytest.raises(SampleMixingError, match="expected samples that do not depend on each"):
        KFACOperator(model, data, lambda model, batch: model(batch[0])[batch[1]], loss)


class PositionsOnce(nn.Module):
    """Positions looked up with a sample axis of length one, which is taken away again."""

    def __init__(self, take):
        super().__init__()
        self.positions, self.head, self.take = nn.Embedding(5, 4), nn.Linear(20, 3), take

    def forward(self, x):
        positions = self.positions(torch.arange(5)[None])
        return self.head(torch.tanh(x + self.take(positions)).flatten(1))


@pytest.mark.parametrize(
    ("take", "reason"),
    [
        (lambda p: p[0], "the rows of its layer are not those of the samples in their order"),
        (lambda p: p.mean(0), "the rows of its layer are not those of the samples in their order"),
        (lambda p: p.view(5, 4), "the input of its layer does not begin with the samples"),
        (lambda p: p.sum(0), "the input of its layer does not begin with the samples"),
    ],
)
def test_a_shared_input_without_a_row_for_every_sample_is_not_covered(take, reason):
    data = [(torch.randn(6, 5, 4), torch.randint(0, 3, (6,)))]
    with pytest.raises(KFACCoverageError, match=rf"positions.weight \({reason}\)"):
        KFACOperator(PositionsOnce(take), data, gallery.of_inputs, nn.CrossEntropyLoss())


def test_a_shared_input_of_a_later_batch_must_serve_every_sample_there_too():
    model = PositionsOnce(lambda p: p if len(p) != 3 else p + 1)  # three rows change it
    data = [(torch.randn(n, 5, 4), torch.randint(0, 3, (n,))) for n in (4, 3)]
    with pytest.raises(KFACCoverageError, match=r"positions.weight \(the input of its layer does"):
        KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())


class FunctionalForLong(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        long = x.shape[1] > 4
        h = F.linear(x, self.inner.weight, self.inner.bias) if long else self.inner(x)
        return self.head(torch.tanh(h)).mean(1)


def test_a_use_outside_of_its_layer_in_a_later_batch_is_noticed():
    data = [(torch.randn(3, steps, 4), torch.randint(0, 3, (3,))) for steps in (3, 5)]
    with pytest.raises(KFACCoverageError, match=r"inner.weight \(used without calling its layer"):
        KFACOperator(FunctionalForLong(), data, gallery.of_inputs, nn.CrossEntropyLoss())


class NoTokensForOneExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 3)

    def forward(self, x):
        y, chosen = torch.zeros_like(x), (x[:, 0] > 0).long()
        for i, expert in enumerate(self.experts):
            y[chosen == i] = torch.tanh(expert(x[chosen == i]))
        return self.head(y)


def test_a_layer_called_without_rows_has_zero_rows():
    x = torch.randn(4, 4)
    x[:, 0] = 1.0
    data = [(x, torch.randint(0, 3, (4,)))]
    K = KFACOperator(NoTokensForOneExpert(), data, gallery.of_inputs, nn.CrossEntropyLoss())
    assert not K.to_dense()[:20].any()
    assert "zero rows: experts.0.weight (without influence)" in repr(K.coverage)


@pytest.mark.parametrize("inplace", [True, False])
def test_an_operation_in_place_on_a_normalisation_changes_nothing(inplace):
    norm = nn.InstanceNorm2d(2, affine=True)
    model = nn.Sequential(norm, nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(18, 3)).double()
    x, y = torch.randn(5, 2, 3, 3).double(), torch.randint(0, 3, (5,))
    K = KFACOperator(model, [(x, y)], gallery.of_inputs, nn.CrossEntropyLoss())
    G = dense_ggn(lambda f: F.cross_entropy(f, y), lambda: model(x), list(norm.parameters()))
    assert relative(K.to_dense()[:4, :4], G) < 1e-12


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "forward-only"])
def test_data_that_are_not_finite_are_refused_with_the_number_of_their_batch(fisher_type):
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    data = [(x, y), (x * float("nan"), y)]
    with pytest.raises(NonFiniteError, match=r"on batch 1 hold"):
        KFACOperator(
            nn.Linear(4, 3), data, gallery.of_inputs, nn.CrossEntropyLoss(), fisher_type=fisher_type
        )


def test_infinite_inputs_of_layers_are_refused_where_outputs_are_finite():
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    data = [(x, y), (torch.cat([torch.full((1, 4), float("inf")), x[1:]]), y)]
    with torch.no_grad():
        model[0].weight.abs_()  # infinity in, one out
    with pytest.raises(NonFiniteError, match="what goes through the model on batch 1 holds"):
        KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x).abs().sqrt()


def test_infinite_gradients_are_refused():
    x, y = torch.zeros(5, 4), torch.randint(0, 3, (5,))
    model = Root()
    nn.init.ones_(model.inner.weight)
    nn.init.zeros_(model.inner.bias)
    data = [(x + 1, y), (x, y)]
    with pytest.raises(NonFiniteError, match="the gradient of the model's outputs on batch 1"):
        KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())


def test_targets_that_are_not_finite_are_refused():
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    data = [(x, y), (x, y * float("inf"))]
    with pytest.raises(NonFiniteError, match="derivatives of the loss on batch 1 hold"):
        KFACOperator(
            nn.Linear(4, 3), data, gallery.of_inputs, nn.MSELoss(), fisher_type="empirical"
        )


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Linear(4, 5), nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x, mask, y):
        context = (torch.tanh(self.encoder(x)) * mask[..., None]).sum(1, keepdim=True)
        return self.head(torch.tanh(self.decoder(y) + context))


@pytest.mark.parametrize(
    ("key", "steps", "labels"), [("y", 2, 2), ("decoder_inputs", 3, 3), ("y", 3, 2)]
)
def test_the_mask_of_an_encoder_is_not_that_of_its_decoder(key, steps, labels):
    batch = {
        "x": torch.randn(2, 3, 4),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        key: torch.randn(2, steps, 2),
        "labels": torch.randint(0, 3, (2, labels)),
    }

    def forward(model, batch):
        return model(batch["x"], batch["attention_mask"], batch[key])[:, -labels:]

    K = KFACOperator(
        EncoderDecoder(),
        [batch],
        forward,
        CrossEntropy(class_axis=-1),
        fisher_type="forward-only",
        param_filter=match_names("decoder.weight"),
    )
    y = batch[key].flatten(0, 1)
    assert relative(K.to_dense()[:2, :2], y.T @ y / len(y)) < 1e-5


def test_an_attention_mask_of_other_numbers_is_refused():
    batch = dict(problem("gpt2").full_batch.items())
    mask = 2 * batch["attention_mask"]
    with pytest.raises(BatchError, match="an attention_mask of zeros and ones, got numbers from 0"):
        kfac(
            problem("gpt2"),
            [{**batch, "attention_mask": mask}],
            hf_lm_loss_of_output(),
        )


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_vectors_taken_a_few_at_once_give_the_same_matrix(fisher_type, monkeypatch):
    p = problem("labelled_sequences")
    expected = kfac(p, fisher_type=fisher_type).to_dense()
    for at_once in (1, 2, 5):
        monkeypatch.setattr(tape.Tape, "vectors_at_once", lambda self, k=at_once: k)
        assert relative(kfac(p, fisher_type=fisher_type).to_dense(), expected) < 1e-12


def test_no_more_vectors_are_made_at_once_than_are_backpropagated(monkeypatch):
    p = problem("labelled_sequences")
    sizes = []
    pulled = tape.Tape._pulled

    def noted(self, calls, V):
        sizes.append(len(V))
        return pulled(self, calls, V)

    monkeypatch.setattr(tape.Tape, "_pulled", noted)
    monkeypatch.setattr(tape.Tape, "vectors_at_once", lambda self: 4)
    kfac(p)
    assert max(sizes) <= 4


def test_a_pickled_operator_holds_neither_model_nor_data():
    p = problem("mlp")
    K = kfac(p)
    copied = pickle.loads(pickle.dumps(K))
    assert torch.equal(copied.to_dense(), K.to_dense())
    assert repr(copied.coverage) == repr(K.coverage)
    held = sum(block.eigenvalues.numel() for block in K.kronecker_blocks)
    x = torch.randn(20_000, 6).double()
    many = kfac(p, [(x, torch.randint(0, 3, (20_000,)))])
    assert held == sum(block.eigenvalues.numel() for block in many.kronecker_blocks)
    assert len(pickle.dumps(many)) < 100_000


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("build", "x", "message"),
    [
        (old_weight_norm, torch.randn(6, 4), r"Linear weight_g \(no K-FAC rule for weight_g of L"),
        (
            lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
            torch.randint(0, 5, (6,)),
            r"Embedding weight \(Embedding scales gradients by frequencies in the batch; build it",
        ),
    ],
)
def test_why_there_is_no_rule_is_said(build, x, message):
    with pytest.raises(KFACCoverageError, match=message):
        KFACOperator(
            build(), [(x, torch.randint(0, 3, (6,)))], gallery.of_inputs, nn.CrossEntropyLoss()
        )


def test_a_tied_weight_without_a_rule_is_named_with_its_aliases():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = ScaledLinear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    data = [(torch.randn(6, 3), torch.randint(0, 2, (6,)))]
    message = r"a.weight \(also used outside of .* its class says, tied to b.weight\)"
    with pytest.raises(KFACCoverageError, match=message):
        KFACOperator(Once(), data, gallery.of_inputs, nn.CrossEntropyLoss())


def test_a_later_batch_of_another_form_is_refused():
    class Model(TimeFirst):
        def forward(self, x):
            return (
                super().forward(x) if len(x) == 6 else self.head(torch.tanh(self.inner(x)).mean(1))
            )

    def batch(n, steps):
        return torch.randn(n, steps, 3), torch.randint(0, 2, (n,))

    data = [batch(4, 5), batch(6, 5)]
    message = r"Linear inner.weight \(the input of its layer does not begin with the samples\)"
    with pytest.raises(KFACCoverageError, match=message):
        KFACOperator(Model(), data, gallery.of_inputs, nn.CrossEntropyLoss())


class Experts(nn.Module):
    """The second layer is called for some batches only, the third's outputs count for nothing."""

    def __init__(self):
        super().__init__()
        self.often, self.seldom, self.never = (nn.Linear(3, 2) for _ in range(3))

    def forward(self, x):
        y = self.often(x) + 0 * self.never(x)
        return y + self.seldom(x) if len(x) == 3 else y


def test_layers_that_only_some_batches_call_are_covered():
    model = Experts().double()
    full = (torch.randn(7, 3).double(), torch.randint(0, 2, (7,)))
    data = gallery.in_batches(full, 4, 3)
    K = KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())
    assert K.coverage.percent == 100
    x, P = data[1][0], model(data[1][0]).softmax(1).detach()
    B = sum(p.diag() - torch.outer(p, p) for p in P) / 7
    block = torch.kron(B, x.T @ x / 3)
    assert relative(K.to_dense()[8:14, 8:14], block) < 1e-12
    assert not K.to_dense()[16:].any()


def test_parameters_without_influence_have_zero_rows():
    p = gallery.mlp()
    model = gallery.mlp().model
    model.register_module("unused", nn.Linear(2, 2).double())

    def forward(model, batch):
        return model[2](model[1](model[0](batch[0])))

    with pytest.warns(UnusedParameterWarning, match="unused.bias, unused.weight"):
        K = KFACOperator(model, p.batches, forward, p.criterion)
    assert K.coverage.percent == 100
    assert "  zero rows: unused.bias (without influence)\n" in repr(K.coverage)
    assert not K.to_dense()[53:].any()
    assert not K.to_dense()[:, 53:].any()


class Fails(nn.Module):
    """Gives out in the middle of a forward pass."""

    left = 0

    def forward(self, x):
        Fails.left -= 1
        if Fails.left < 0:
            raise RuntimeError("out of memory")
        return x


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


@pytest.mark.parametrize("last", [2, 5])  # of forward passes: of the factors, or before
@pytest.mark.parametrize("operator", [KFACOperator, EKFACOperator])
def test_hooks_are_removed_also_after_exceptions(operator, last):
    p = gallery.mlp()
    model = nn.Sequential(p.model[0], Fails(), p.model[2])
    mine = model[0].register_forward_hook(lambda module, inputs, outputs: None)
    Fails.left = 1000
    operator(model, p.batches, p.forward_fn, p.criterion)
    Fails.left = 1000 - Fails.left - last
    with pytest.raises(RuntimeError, match="out of memory"):
        operator(model, p.batches, p.forward_fn, p.criterion)
    assert hooks(model) == [mine.id]
    with pytest.raises(KFACCoverageError):
        kfac(problem("attention"))
    assert hooks(problem("attention").model) == []


@pytest.mark.parametrize("operator", [KFACOperator, EKFACOperator])
def test_the_model_is_as_it_was_and_the_matrix_stays_as_it_is(operator):
    p = gallery.cnn()
    before = {name: t.clone() for name, t in p.model.state_dict().items()}
    p.model[0].weight.grad = torch.ones_like(p.model[0].weight)
    K = kfac(p, operator=operator)
    assert hooks(p.model) == []
    assert all(torch.equal(t, before[name]) for name, t in p.model.state_dict().items())
    assert torch.equal(p.model[0].weight.grad, torch.ones_like(p.model[0].weight))
    dense = K.to_dense()
    with torch.no_grad():
        p.model[0].weight.zero_()
    assert torch.equal(K.to_dense(), dense)


def test_the_inverse_solves_with_the_dense_matrix():
    p = problem("gpt2")
    K = kfac(p, criterion=hf_lm_loss_of_output())
    V = K.space.random(3, seed=1)
    damped = K.to_dense() + 0.01 * torch.eye(K.size).double()
    inverse = K.inverse(0.01)
    assert isinstance(inverse, KroneckerOperator)
    assert relative(inverse @ (K @ V), torch.linalg.solve(damped, K.to_dense() @ V)) < 1e-11
    assert "inverse of KFACOperator + 0.01 I" in repr(inverse)


def test_the_pi_split_equals_that_of_dense_factors():
    p = problem("mlp")
    K = kfac(p).inverse(0.1, split="pi").to_dense()
    f = layer_factors(p.model, p.model[0], samples_of(p), loss_hessians(p))
    pi = (f.A.trace() / len(f.A) / (f.B.trace() / len(f.B))).sqrt()
    A = f.A + pi * 0.1**0.5 * torch.eye(6).double()
    B = f.B + 0.1**0.5 / pi * torch.eye(5).double()
    weight = torch.kron(torch.linalg.inv(B), torch.linalg.inv(A))
    assert relative(K[:30, :30], weight) < 1e-12
    bias = torch.linalg.inv(f.B + 0.1 * torch.eye(5).double())
    assert relative(K[30:35, 30:35], bias) < 1e-12


def test_a_saved_kfac_operator_is_loaded_with_its_layout(tmp_path):
    K = kfac(problem("mlp"), separate_weight_and_bias=False)
    K.save(tmp_path / "kfac.safetensors")
    loaded = KFACOperator.load(tmp_path / "kfac.safetensors")
    assert relative(loaded.to_dense(), K.to_dense()) < 1e-14
    assert loaded.layout == K.layout
    assert loaded.notes == K.notes
    restricted = loaded.restrict(match_names("2.*"))
    assert relative(restricted.to_dense(), K.to_dense()[35:, 35:]) < 1e-14


def test_the_operator_says_what_it_is():
    K = kfac(problem("mlp"))
    assert repr(K) == (
        "<KFACOperator 53x53 float64 cpu | Sequential, 4 of 4 tensors | 23 samples in 3 batches, "
        "mean over unmasked labels | eval mode | type-2, expand>"
    )
    assert repr(K.coverage) == (
        "K-FAC covers 100 % of the 53 entries, in 4 tensors\n  0: Linear\n  2: Linear"
    )
    K.check(strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher_type": "type-1"}, "unknown fisher_type 'type-1'; choose one of type-2, mc"),
        ({"approximation": "sum"}, "unknown approximation 'sum'; choose one of expand, reduce"),
        ({"unsupported": "warn"}, "unknown unsupported 'warn'; choose one of error, diag"),
        ({"mc_samples": 0}, "mc_samples to be an integer of at least 1, got 0"),
        (
            {"fisher_type": "forward-only", "unsupported": "diag"},
            'takes a diagonal of squared gradients, which fisher_type="forward-only" does not',
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        kfac(problem("mlp"), **options)


def test_a_loss_without_distribution_has_no_monte_carlo_factors():
    with pytest.raises(OptionError, match="no Fisher matrix"):
        kfac(problem("regression"), criterion=nn.HuberLoss(), fisher_type="mc")


def test_forward_only_does_not_cover_normalisations():
    with pytest.raises(KFACCoverageError, match="its block needs gradients, which forward-only"):
        kfac(problem("group_norm"), fisher_type="forward-only")


def test_batch_norm_in_train_mode_is_refused():
    p = gallery.cnn()
    with pytest.raises(SampleMixingError, match="BatchNorm 1 uses the batch in train mode"):
        kfac(p, mode="train")


def test_sparse_embeddings_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randint(0, 5, (6, 4)), torch.randint(0, 3, (6,)))]
    with pytest.raises(ParameterError, match=r"Embedding 0 has sparse gradients; .*sparse=False"):
        KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())


def test_quantised_weights_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    data = [(torch.randn(6, 3), torch.randint(0, 3, (6,)))]
    with pytest.raises(ParameterError, match=r"'0.weight' has dtype torch.int8: K-FAC needs"):
        KFACOperator(model, data, gallery.of_inputs, nn.CrossEntropyLoss())
