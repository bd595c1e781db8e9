"""A CurvatureWatch measures when it is time, and training goes on as if it had not."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from torchlinop import GGNOperator, HessianOperator, LambdaOperator, MatrixOperator, lanczos
from torchlinop.callbacks import CurvatureWatch, Density, TopEigenvalues, Trace
from torchlinop.errors import NonFiniteError, OptionError, TorchlinopWarning
from torchlinop.testing.oracles import dense_hessian

HELD = (torch.randn(16, 4), torch.randint(0, 3, (16,)))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def hessian_of(model):
    return HessianOperator(model, [HELD], loss_fn)


def hessian_with_random_numbers(model):
    torch.rand(2), np.random.rand(2), random.random()
    return hessian_of(model)


def new_model():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
    return nn.Sequential(*layers).train()


def trained(watch=None, steps=6):
    """All that training leaves behind: losses, parameters, buffers, optimiser, random states."""
    model = new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        if watch is not None:
            watch(step, model)
        noise = torch.tensor(random.random() * np.random.rand())
        batch = torch.randn(8, 4) * noise, torch.randint(0, 3, (8,))
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    moments = [s for state in optimizer.state.values() for s in state.values()]
    gradients = [p.grad for p in model.parameters()]
    modes = torch.tensor([m.training for m in model.modules()])
    randoms = torch.rand(3), torch.tensor(np.random.rand(3)), torch.tensor(random.random())
    return [*losses, *model.state_dict().values(), *moments, *gradients, modes, *randoms]


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    "measures",
    [[TopEigenvalues(2)], [Trace(16)], [Density(1, 5)], [TopEigenvalues(1), Trace(8)]],
    ids=["top", "trace", "density", "both"],
)
def test_training_is_bit_identical_with_and_without(measures, every):
    random.seed(0)
    np.random.seed(0)
    plain = trained()
    random.seed(0)
    np.random.seed(0)
    watch = CurvatureWatch(hessian_with_random_numbers, measures, every=every)
    watched = trained(watch)
    assert all(map(torch.equal, plain, watched))
    assert [row["step"] for row in watch.history] == list(range(0, 6, every))


def test_numbers_are_those_of_the_matrix_at_that_step():
    watch = CurvatureWatch(hessian_of, [TopEigenvalues(2, tol=1e-6), Trace(200)], every=2)
    model = new_model()
    numbers = watch(2, model)
    model.eval()
    H = dense_hessian(lambda: loss_fn(model, HELD), [*model.parameters()])
    exact = torch.linalg.eigvalsh(H)
    assert numbers["curvature/eigenvalue_1"] == pytest.approx(float(exact[-1]), rel=1e-4)
    assert numbers["curvature/eigenvalue_2"] == pytest.approx(float(exact[-2]), rel=1e-4)
    assert numbers["curvature/trace"] == pytest.approx(float(H.trace()), rel=1e-4)
    assert numbers == watch.scalars()
    assert watch.history == [{"step": 2, **numbers}]


@pytest.mark.parametrize(
    ("measure", "names"),
    [
        (TopEigenvalues(2), ["eigenvalue_1", "eigenvalue_2", "converged"]),
        (Trace(20), ["trace", "trace_stderr"]),
        (Density(2, 5), [f"density_{name}" for name in
                         ("smallest_node", "largest_node", "sigma", "negative_mass", "outliers")]),
    ],
)  # fmt: skip
def test_every_measure_has_finite_numbers_under_the_name_of_the_watch(measure, names):
    watch = CurvatureWatch(hessian_of, [measure], name="held")
    numbers = watch(0, new_model())
    assert [*numbers] == [f"held/{name}" for name in [*names, "seconds"]]
    assert all(map(math.isfinite, numbers.values()))


def matrix(drift):
    """A fixed matrix with a gap after the second eigenvalue, and one near to it."""
    A = torch.diag(torch.cat([torch.tensor([50.0, 40.0]), torch.linspace(0, 10, 98)]))
    E = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    return MatrixOperator(A + drift * (E + E.T))


@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_a_run_that_starts_from_the_last_takes_fewer_products(tol):
    measure = TopEigenvalues(2, tol=tol)
    first = measure(matrix(0.0), None)
    cold, warm = measure(matrix(1e-3), None), measure(matrix(1e-3), first)
    assert warm.matvecs < cold.matvecs
    assert torch.allclose(warm.eigenvalues, cold.eigenvalues, rtol=1e-4)


def test_a_start_is_random_where_the_matrix_has_another_size():
    measure = TopEigenvalues(1)
    last = measure(MatrixOperator(torch.eye(5)), None)
    found = measure(matrix(0.0), last)
    assert torch.equal(found.eigenvalues, measure(matrix(0.0), None).eigenvalues)


def test_only_the_last_results_are_kept_and_a_step_is_measured_once():
    watch = CurvatureWatch(hessian_of, [TopEigenvalues(1), Trace(8)], every=3)
    model = new_model()
    assert [bool(watch(step, model)) for step in (0, 1, 3, 3, 5, 6)] == [1, 0, 1, 0, 0, 1]
    top, trace = watch.results
    assert top.eigenvectors.shape == (new_model()[0].weight.numel() + 8 + 16 + 24 + 3, 1)
    assert watch.scalars()["curvature/trace"] == trace.estimate


def test_the_history_is_a_table():
    pytest.importorskip("pandas")
    watch = CurvatureWatch(hessian_of, [TopEigenvalues(1)], every=3)
    for step in range(7):
        watch(step, new_model())
    assert watch.to_dataframe()["step"].tolist() == [0, 3, 6]


def test_any_operator_and_any_measure_can_be_followed():
    class Largest:
        def __call__(self, op, last):
            return lanczos(op, 1, which="LA")

        def scalars(self, found):
            return {"largest": float(found.eigenvalues[0])}

    def ggn_of(model):
        return GGNOperator(model, [HELD], lambda m, b: m(b[0]), nn.CrossEntropyLoss())

    assert CurvatureWatch(ggn_of, [Largest()])(0, new_model())["curvature/largest"] > 0


def test_what_fails_at_first_is_raised_and_what_fails_later_is_warned_of():
    model = new_model()
    watch = CurvatureWatch(hessian_of, [TopEigenvalues(1)])
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        watch(0, model)
    model = new_model()
    watch(0, model)
    model[0].weight.data[0, 0] = math.nan
    with pytest.warns(TorchlinopWarning, match="not measured at step 100: NonFiniteError: .* goes"):
        assert watch(100, model) == {}
    assert watch.history[-1] == {"step": 100}
    assert watch.results[0].eigenvalues.isfinite().all()


@pytest.mark.filterwarnings("ignore::torchlinop.errors.NotConvergedWarning")
@pytest.mark.parametrize("measure", [TopEigenvalues(tol=1e-6), Trace(200), Density(1, 60)])
def test_ctrl_c_during_a_measurement_ends_the_training(measure):
    taken = []

    def product(V):
        taken.append(V[:1].numel())
        if sum(taken) > 40:
            raise KeyboardInterrupt
        return torch.einsum("i,i...->i...", torch.linspace(0, 1, 300), V)

    op = LambdaOperator(300, product, matmat=product)
    watch = CurvatureWatch(lambda model: op, [measure])
    with pytest.raises(KeyboardInterrupt):
        watch(0, new_model())
    assert watch.history == []


def test_models_are_watched_inside_of_their_wrappers():
    model = new_model()
    watch = CurvatureWatch(hessian_of, [TopEigenvalues(1)])
    plain = watch(0, model)["curvature/eigenvalue_1"]
    wrapped = nn.DataParallel(model)
    assert watch(100, wrapped)["curvature/eigenvalue_1"] == pytest.approx(plain, rel=1e-3)
    assert wrapped.training


@pytest.mark.parametrize("every", [0, -1, 1.5, None])
def test_a_period_below_one_is_refused(every):
    with pytest.raises(OptionError, match=f"expected every to be at least 1, got {every}; 100"):
        CurvatureWatch(hessian_of, every=every)


def test_nothing_to_measure_is_refused():
    with pytest.raises(OptionError, match="expected something to measure, got none; pass"):
        CurvatureWatch(hessian_of, [])


def test_the_repr_says_what_is_measured_and_how_often():
    assert repr(CurvatureWatch(hessian_of, [Trace(8)])) == (
        "<CurvatureWatch every 100 steps | Trace(num_matvecs=8, method='auto', seed=0) | 0 rows>"
    )
