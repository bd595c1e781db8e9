"""What is decided silently is written to the logger "torchlinop"; warnings come by category."""

import logging
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import torchlinop
from torchlinop import (
    ForwardOverReverse,
    GGNOperator,
    HessianOperator,
    MatrixOperator,
    as_linear_operator,
    errors,
    from_linear_operator,
    lanczos,
    trace,
)
from torchlinop.losses import fused_cross_entropy

DATA = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(2)]
LABELLED = [(torch.randn(4, 3), torch.randint(0, 2, (4,)))]


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def huber(model, batch):
    return nn.functional.huber_loss(model(batch[0]), batch[1], delta=0.1)


def hessian(model=None, loss=mse, **options):
    return HessianOperator(model or nn.Linear(3, 2), DATA, loss, **options)


def ggn(loss, data=DATA):
    return GGNOperator(nn.Linear(3, 2), data, lambda model, batch: model(batch[0]), loss)


def by_forward_mode():
    H = hessian(loss=huber, method=ForwardOverReverse())
    H @ torch.ones(H.size)


def half():
    return MatrixOperator(torch.eye(8, dtype=torch.bfloat16))


def cross_entropy():
    fused_cross_entropy._log_choice.cache_clear()
    G = ggn(nn.CrossEntropyLoss(), LABELLED)
    G @ torch.ones(G.size)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (hessian, "the matrix is that of Linear, 2 of 2 tensors | 8 samples in 2 batches, mean "
         "over samples | eval mode"),
        (hessian, "attention by its mathematical kernel, autocast off"),
        (hessian, "the data are kept, on cpu"),
        (hessian, "the graphs at theta are kept"),
        (lambda: hessian(memory_budget=1), "rebuilt for every product: 0.0 MB are more than"),
        (lambda: hessian(linearization="rebuild"), "rebuilt for every product: as asked"),
        (lambda: hessian(method="finite_difference"), "rebuilt for every product: nothing can be"),
        (lambda: hessian(nn.DataParallel(nn.Linear(3, 2))), "DataParallel: the Linear inside is"),
        (lambda: hessian(nn.Linear(3, 2).bfloat16(), lambda m, b: mse(m.float(), b)),
         "vectors are in torch.float32, though some parameters are in torch.bfloat16"),
        (lambda: hessian() @ torch.ones(8, 4), "columns go through one pass"),
        (by_forward_mode, "no forward-mode product, using ReverseOverReverse()"),
        (lambda: ggn(nn.SoftMarginLoss()), "SoftMarginLoss() is no loss known in closed form: "
         "it is differentiated by autograd"),
        (cross_entropy, "products with the Hessian of cross-entropy on cpu: eager"),
        (lambda: lanczos(half(), 1), "vectors of the solver are in torch.float32, products in"),
        (lambda: lanczos(half(), 1), "lanczos by Plan(ncv=8, block_size=1"),
        (lambda: as_linear_operator(half()), "vectors are exchanged in float32, products are in"),
        (lambda: from_linear_operator(np.eye(2, dtype=int)),
         "a matrix of int64 acts in torch.float64"),
        (lambda: trace(MatrixOperator(torch.eye(99)), 20), "trace by xtrace, of at most 20"),
    ],
)  # fmt: skip
def test_decisions_are_logged_once(act, message, caplog):
    with caplog.at_level("INFO", "torchlinop"):
        act()
    assert caplog.text.count(message) == 1
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_products_log_nothing(caplog):
    H = hessian()
    v = H @ torch.ones(H.size)
    with caplog.at_level("DEBUG", "torchlinop"):
        H @ v
    assert not caplog.records


def test_nothing_is_printed_where_logging_is_not_set_up():
    script = (
        "import logging, torchlinop\n"
        "log = logging.getLogger('torchlinop')\n"
        "log.error('unseen')\n"
        "assert log.level == logging.NOTSET and log.propagate\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    (handler,) = logging.getLogger("torchlinop").handlers
    assert isinstance(handler, logging.NullHandler)


def training_model():
    return HessianOperator(nn.Sequential(nn.Dropout(), nn.Linear(3, 2)), DATA, mse)


def stopped_early():
    lanczos(MatrixOperator(torch.linspace(1.0, 2.0, 200).diag()), 5, 25, tol=1e-6)


@pytest.mark.parametrize(
    ("act", "category"),
    [(training_model, errors.TrainModeWarning), (stopped_early, errors.NotConvergedWarning)],
)
def test_a_category_of_warnings_can_be_filtered(act, category):
    with pytest.warns(category):
        act()
    for ignored in (category, torchlinop.TorchlinopWarning, UserWarning):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ignored)
            act()
    with warnings.catch_warnings():
        warnings.simplefilter("error", category)
        with pytest.raises(category):
            act()


def test_warnings_point_to_the_line_of_the_caller():
    with pytest.warns(errors.NotConvergedWarning) as caught:
        stopped_early()
    assert {warning.filename for warning in caught} == {__file__}


CATEGORIES = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", CATEGORIES, ids=lambda kind: kind.__name__)
def test_every_error_and_warning_is_one_of_ours(kind):
    root = torchlinop.TorchlinopWarning if kind.__name__.endswith("Warning") else None
    assert issubclass(kind, root or torchlinop.TorchlinopError)
