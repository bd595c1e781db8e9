"""Where curvlinops 3.0.1 is wrong or fails: a reproducer each, with its error and ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import curvlinops
import numpy as np
import torch
from curvlinops import CGInverseLinearOperator
from curvlinops.examples import IdentityLinearOperator, TensorLinearOperator
from curvlinops.papyan2020traces.spectrum import fast_lanczos
from torch import nn

import torchlinop as tl
from torchlinop.losses import supervised_loss
from torchlinop.testing import gallery, spectra
from torchlinop.testing.dense_kfac import dense_kfac
from torchlinop.testing.oracles import dense_ggn, dense_hessian

# Relative errors, or what is raised: (curvlinops, torchlinop)
Errors = tuple[float | str, float]

DEFECTS: dict[str, tuple[str, Callable[[], Errors]]] = {}


def defect(title: str) -> Callable[[Callable[[], Errors]], Callable[[], Errors]]:
    """Registers a reproducer under its name, with the sentence that the page says."""

    def register(reproducer: Callable[[], Errors]) -> Callable[[], Errors]:
        DEFECTS[reproducer.__name__] = (title, reproducer)
        return reproducer

    return register


def relative(A, truth):
    return float((A - truth).abs().max() / truth.abs().max())


def theirs(name, model, loss, data, **options):
    """Its operator, without the six passes that check that the data are always the same."""
    operator = getattr(curvlinops, name)
    return operator(
        model, loss, list(model.parameters()), data, check_deterministic=False, **options
    )


def by_theirs(name, model, loss, data, **options):
    """The matrix of it."""
    n = sum(p.numel() for p in model.parameters())
    return (theirs(name, model, loss, data, **options) @ torch.eye(n).double()).detach()


def raised(question):
    """The name of the exception, or "nothing"."""
    try:
        question()
    except Exception as error:
        return type(error).__name__
    return "nothing"


@defect("The mean of a loss with class weights, in several batches, is weighed by samples.")
def class_weights_in_several_batches():
    p = gallery.weighted_classes()
    truth = dense_hessian(p.full_loss, p.parameters)
    ours = tl.HessianOperator(p.model, p.batches, supervised_loss(p.criterion)).to_dense()
    H = by_theirs("HessianLinearOperator", p.model, p.criterion, p.batches)
    return relative(H, truth), relative(ours, truth)


@defect("So is the mean over labels some of which are ignored.")
def ignored_labels_in_several_batches():
    p = gallery.masked_labels()
    truth = dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)
    ours = tl.GGNOperator(p.model, p.batches, p.forward_fn, p.criterion).to_dense()
    G = by_theirs("GGNLinearOperator", p.model, p.criterion, p.batches)
    return relative(G, truth), relative(ours, truth)


@defect("With class weights, the empirical Fisher of the same data depends on their batches.")
def empirical_fisher_in_other_batches():
    p = gallery.weighted_classes()
    data = ([p.full_batch], p.batches)
    one, many = (by_theirs("EFLinearOperator", p.model, p.criterion, d) for d in data)
    our_one, our_many = (
        tl.EmpiricalFisherOperator(p.model, d, p.forward_fn, p.criterion).to_dense() for d in data
    )
    return relative(many, one), relative(our_many, our_one)


@defect("K-FAC takes no notice of class weights, even where it is exact: in one linear layer.")
def kfac_with_class_weights():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    batch = (torch.randn(1, 4).double(), torch.tensor([2]))
    loss = nn.CrossEntropyLoss(torch.tensor([0.25, 1.0, 3.0]).double(), reduction="sum")
    truth = dense_ggn(
        lambda f: loss(f, batch[1]), lambda: model(batch[0]), list(model.parameters())
    )
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    ours = tl.KFACOperator(model, [batch], gallery.of_inputs, loss, **options).to_dense()
    K = by_theirs("KFACLinearOperator", model, loss, [batch], **options)
    return relative(K, truth), relative(ours, truth)


@defect("The Monte Carlo Fisher counts ignored labels: here, all but that of the first feature.")
def fisher_with_ignored_labels():
    model = nn.Linear(4, 2, bias=False).double()
    X, y = torch.eye(4).double(), torch.tensor([1, -100, -100, -100])  # a sample, a feature
    loss, counted = nn.CrossEntropyLoss(), torch.eye(4)[0].repeat(2)
    ours = tl.FisherOperator(model, [(X, y)], gallery.of_inputs, loss, mc_samples=3).to_dense()
    M = by_theirs("FisherMCLinearOperator", model, loss, [(X, y)], mc_samples=3)
    return tuple(relative(A, torch.outer(counted, counted) * A) for A in (M, ours))


@defect("The Hessian of LayerNorm has wrong rows for its weights, and is not symmetric.")
def hessian_of_layer_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    batch = (torch.randn(9, 3).double(), torch.randint(0, 2, (9,)))
    truth = dense_hessian(lambda: gallery.cross_entropy(model, batch), list(model.parameters()))
    ours = tl.HessianOperator(model, [batch], gallery.cross_entropy).to_dense()
    H = by_theirs("HessianLinearOperator", model, nn.CrossEntropyLoss(), [batch])
    return relative(H, truth), relative(ours, truth)


@defect("The block of a module used twice has a wrong trace; EKFAC should keep that of the GGN.")
def ekfac_of_a_module_used_twice():
    p = gallery.reused_module()
    truth = dense_ggn(p.loss_of_outputs, p.outputs, p.parameters).trace()
    ours = tl.EKFACOperator(p.model, p.batches, p.forward_fn, p.criterion).trace()
    E = by_theirs("EKFACLinearOperator", p.model, p.criterion, p.batches, fisher_type="type-2")
    return relative(E.trace(), truth), relative(ours, truth)


@defect("Circular padding is taken for zeros in K-FAC's A.")
def kfac_of_circular_padding():
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(27, 2)).double()
    batch = (torch.randn(5, 2, 3, 3).double(), torch.randint(0, 2, (5,)))
    loss = nn.CrossEntropyLoss()
    P = model(batch[0]).softmax(1).detach()
    M = (torch.diag_embed(P) - P[:, :, None] * P[:, None, :]) / len(P)
    truth = dense_kfac(model, list(batch[0]), lambda f, n: M[n])
    ours = tl.KFACOperator(model, [batch], gallery.of_inputs, loss).to_dense()
    K = by_theirs("KFACLinearOperator", model, loss, [batch], fisher_type="type-2")
    return relative(K, truth), relative(ours, truth)


@defect("Type-2 K-FAC of sequences mixes the loss terms of a sample.")
def kfac_of_sequences():
    p = gallery.real_sequences()
    f = p.outputs()
    M = 2 / f.numel() * torch.eye(f[0].numel()).double()  # the Hessian of the squared error
    truth = dense_kfac(p.model, list(p.full_batch[0]), lambda f, n: M)
    ours = tl.KFACOperator(p.model, p.batches, p.forward_fn, p.criterion).to_dense()
    K = by_theirs("KFACLinearOperator", p.model, p.criterion, p.batches, fisher_type="type-2")
    return relative(K, truth), relative(ours, truth)


@defect("EKFAC-reduce depends on the batches, where there are fewer samples than inputs.")
def ekfac_reduce_in_other_batches():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(9, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).double()
    full = (torch.randn(5, 3, 9).double(), torch.randint(0, 3, (5,)))
    loss, data = nn.CrossEntropyLoss(), ([full], gallery.in_batches(full, 2, 2, 1))
    options = {"fisher_type": "type-2", "kfac_approx": "reduce"}
    one, many = (by_theirs("EKFACLinearOperator", model, loss, d, **options) for d in data)
    our_one, our_many = (
        tl.EKFACOperator(model, d, gallery.of_inputs, loss, approximation="reduce").to_dense()
        for d in data
    )
    return relative(many, one), relative(our_many, our_one)


@defect("Data that can be read once give a Hessian of zeros.")
def a_generator_for_data():
    p = gallery.mlp()
    truth = dense_hessian(p.full_loss, p.parameters)
    H = by_theirs("HessianLinearOperator", p.model, p.criterion, (b for b in p.batches))
    ours = tl.HessianOperator(p.model, (b for b in p.batches), p.loss_fn).to_dense()
    return relative(H, truth), relative(ours, truth)


@defect("A vector of integers gives a product cut down to integers.")
def a_vector_of_integers():
    p = gallery.mlp()
    v = np.ones(53, dtype=np.int64)
    truth = dense_hessian(p.full_loss, p.parameters) @ torch.from_numpy(v).double()
    H = theirs("HessianLinearOperator", p.model, p.criterion, p.batches).to_scipy()
    ours = tl.as_linear_operator(tl.HessianOperator(p.model, p.batches, p.loss_fn))
    return tuple(relative(torch.from_numpy(A @ v).double(), truth) for A in (H, ours))


@defect("Of a complex vector, the imaginary part is dropped.")
def a_complex_vector():
    p = gallery.mlp()
    v = np.ones(53) + 1j * np.arange(53)
    truth = dense_hessian(p.full_loss, p.parameters) + 0j
    truth = truth @ torch.from_numpy(v)
    H = theirs("HessianLinearOperator", p.model, p.criterion, p.batches).to_scipy()
    ours = tl.as_linear_operator(tl.HessianOperator(p.model, p.batches, p.loss_fn))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says it, once a process
        return tuple(relative(torch.from_numpy(A @ v), truth) for A in (H, ours))


@defect("Conjugate gradients stop far from the solution, unless told otherwise: the residual.")
def conjugate_gradients_by_default():
    p = gallery.mlp()
    b = torch.ones(53).double()
    identity = IdentityLinearOperator(
        [tuple(q.shape) for q in p.parameters], b.device, torch.float64
    )
    G = theirs("GGNLinearOperator", p.model, p.criterion, p.batches) + 0.01 * identity
    x = (CGInverseLinearOperator(G) @ b).detach()
    ours = tl.GGNOperator(p.model, p.batches, p.forward_fn, p.criterion)
    our_x = tl.solve(ours, b, 0.01, method="cg").x
    A = dense_ggn(p.loss_of_outputs, p.outputs, p.parameters) + 0.01 * torch.eye(53).double()
    return relative(A @ x, b), relative(A @ our_x, b)


@defect("Lanczos gives copies of large eigenvalues for others: the five largest, after 120 steps.")
def ghosts_of_lanczos():
    exact = spectra.neural(500).float().sort(descending=True).values
    A, _ = gallery.with_spectrum(exact.double())
    ritz, _ = fast_lanczos(TensorLinearOperator(A.float()), 120)
    ours = tl.lanczos(tl.MatrixOperator(A.float()), 5, which="LA", max_iter=120).eigenvalues
    return relative(ritz.flip(0)[:5], exact[:5]), relative(ours, exact[:5])


@defect("A K-FAC product that fails leaves its hooks on the model: every later one fails, too.")
def hooks_after_an_exception():
    p = gallery.mlp()
    wrong = [(X[:, :5], y) for X, y in p.batches]  # five features for six
    raised(
        lambda: by_theirs(
            "KFACLinearOperator", p.model, p.criterion, wrong, fisher_type="empirical"
        )
    )
    later = raised(lambda: by_theirs("GGNLinearOperator", p.model, p.criterion, p.batches))
    p = gallery.mlp()
    raised(lambda: tl.KFACOperator(p.model, wrong, p.forward_fn, p.criterion))
    ours = tl.GGNOperator(p.model, p.batches, p.forward_fn, p.criterion).to_dense()
    return later, relative(ours, dense_ggn(p.loss_of_outputs, p.outputs, p.parameters))


def of_model(make, operator):
    p = make()
    if operator == "HessianLinearOperator":
        truth = dense_hessian(p.full_loss, p.parameters)
        ours = tl.HessianOperator(p.model, p.batches, p.loss_fn).to_dense()
    else:
        truth = dense_ggn(p.loss_of_outputs, p.outputs, p.parameters)
        ours = tl.GGNOperator(p.model, p.batches, p.forward_fn, p.criterion).to_dense()
    refusal = raised(lambda: by_theirs(operator, p.model, p.criterion, p.batches))
    return refusal, relative(ours, truth)


@defect("SiLU and GroupNorm have no Hessian.")
def hessian_of_silu_and_group_norm():
    return of_model(gallery.group_norm, "HessianLinearOperator")


@defect("Nor has attention by torch's default kernel.")
def hessian_of_attention():
    return of_model(gallery.attention, "HessianLinearOperator")


@defect("Nor its GGN.")
def ggn_of_attention():
    return of_model(gallery.attention, "GGNLinearOperator")


@defect("Weight normalisation has no GGN.")
def ggn_of_weight_norm():
    return of_model(gallery.weight_norm, "GGNLinearOperator")


@defect("Nor has a model with activation checkpoints.")
def ggn_of_activation_checkpoints():
    return of_model(gallery.checkpointed, "GGNLinearOperator")


@defect("Nor has an autograd function of the user's.")
def ggn_of_a_custom_function():
    return of_model(gallery.custom_function, "GGNLinearOperator")
