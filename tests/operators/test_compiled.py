"""Products run as programs are those of the matrix, and what cannot be a program is refused."""

import functools
import gc
import pickle
import shutil
import weakref

import pytest
import torch
from torch import nn

from torchlinop import (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    JacobianOperator,
)
from torchlinop.compiled import WIDTHS, Compiled, Programs
from torchlinop.errors import (
    CaptureError,
    CheckpointError,
    DataError,
    MemoryEstimateError,
    OptionError,
    TorchlinopWarning,
    TrainModeWarning,
)
from torchlinop.losses import CrossEntropy
from torchlinop.operators.of_objective import ObjectiveOperator
from torchlinop.testing import gallery
from torchlinop.testing.oracles import (
    class_outcomes,
    dense_empirical_fisher,
    dense_fisher,
    dense_ggn,
    dense_hessian,
    dense_jacobian,
)
from torchlinop.traced import traced

PROBLEMS = {"mlp": gallery.mlp, "cnn": gallery.cnn, "gpt2": gallery.gpt2}


@functools.cache
def problem(name):
    """A problem with one term of the loss for every row of the outputs."""
    p = PROBLEMS[name]()
    if name != "gpt2":
        return p
    rows = p.full_batch["input_ids"]

    def rows_of(model, batch):
        return model(batch[0]).logits.flatten(0, 1)

    full = (rows, rows.flatten())
    return gallery.Problem(p.model, [full], gallery.cross_entropy, full, rows_of)


def terms_of(p, targets):
    return gallery.unreduced(nn.CrossEntropyLoss(), p.outputs(), targets)


def hessian(p, **options):
    def loss_fn(model, batch):
        return nn.functional.cross_entropy(p.forward_fn(model, batch), batch[1])

    return HessianOperator(p.model, p.batches, loss_fn, **options)


def ggn(p, **options):
    return GGNOperator(p.model, p.batches, p.forward_fn, nn.CrossEntropyLoss(), **options)


def empirical_fisher(p, **options):
    return EmpiricalFisherOperator(
        p.model, p.batches, p.forward_fn, nn.CrossEntropyLoss(), **options
    )


def fisher(p, **options):
    return FisherOperator(p.model, p.batches, p.forward_fn, nn.CrossEntropyLoss(), **options)


def terms(p):
    return len(p.full_batch[1])


ORACLES = {
    hessian: lambda p: dense_hessian(lambda: p.loss_of_outputs(p.outputs()), p.parameters),
    ggn: lambda p: dense_ggn(p.loss_of_outputs, p.outputs, p.parameters),
    empirical_fisher: lambda p: dense_empirical_fisher(
        lambda: terms_of(p, p.full_batch[1]), 1 / terms(p), p.parameters
    ),
    fisher: lambda p: dense_fisher(
        lambda y: terms_of(p, y), class_outcomes(p.outputs()), 1 / terms(p), p.parameters
    ),
}


@functools.cache
def oracle(build, name):
    return ORACLES[build](problem(name))


def relative(A, reference):
    return float((A - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("build", ORACLES, ids=lambda build: build.__name__)
def test_compiled_products_are_those_of_the_dense_matrix(build, name):
    A = build(problem(name), compile=True, column_chunk=3)
    V = A.space.random(7, seed=1)  # two chunks of three columns, and one column
    assert relative(A @ V, oracle(build, name) @ V) < 1e-12
    assert relative(A @ V.flip(0)[:, 0], oracle(build, name) @ V.flip(0)[:, 0]) < 1e-12
    assert A.linearization == "kept"
    assert "kept, compiled" in repr(A)


@pytest.mark.parametrize("mc_samples", [1, 3])
def test_compiled_monte_carlo_fisher_is_the_eager_one(mc_samples):
    p = problem("mlp")
    A, F = fisher(p, mc_samples=mc_samples, compile=True), fisher(p, mc_samples=mc_samples)
    assert relative(A.to_dense(), F.to_dense()) < 1e-14


def test_a_compiled_jacobian_and_its_transpose_are_those_of_the_dense_one():
    p = problem("mlp")
    J = JacobianOperator(p.model, p.batches, p.forward_fn, compile=True, column_chunk=2)
    expected = dense_jacobian(p.outputs, p.parameters)
    V, U = torch.randn(53, 3).double(), torch.randn(69, 3).double()
    assert relative(J @ V, expected @ V) < 1e-12
    assert relative(J.T @ U, expected.T @ U) < 1e-12


@pytest.mark.parametrize(
    "name", ["recurrent", "weight_norm", "custom_function", "attention", "group_norm", "tied"]
)
def test_models_of_all_kinds_are_compiled(name):
    p = getattr(gallery, name)()
    options = {"column_chunk": 2}
    A = HessianOperator(p.model, p.batches, p.loss_fn, compile=True, **options)
    H = HessianOperator(p.model, p.batches, p.loss_fn, **options)
    V = A.space.random(3)
    torch.testing.assert_close(A @ V, H @ V, rtol=1e-12, atol=1e-14)


def test_loss_hessians_of_their_own_kernels_are_recorded_as_operations():
    p = problem("mlp")
    A = GGNOperator(p.model, p.batches, p.forward_fn, CrossEntropy(fused="compile"), compile=True)
    V = A.space.random(2)
    assert relative(A @ V, oracle(ggn, "mlp") @ V) < 1e-12


def test_blocks_of_any_layout_are_multiplied():
    A, expected = hessian(problem("mlp"), compile=True, column_chunk=2), oracle(hessian, "mlp")
    V = torch.randn(53, 8).double()
    for block in (V[:, :2], V[:, ::4], V.T.contiguous().T[:, :2], V[:, :1].expand(53, 2)):
        assert relative(A @ block, expected @ block) < 1e-12


def test_a_compiled_product_does_not_follow_the_training_of_the_model():
    p = gallery.mlp()
    A = hessian(p, compile=True)
    v = A.space.random(1)[:, 0]
    before = A @ v
    with torch.no_grad():
        for parameter in p.model.parameters():
            parameter.mul_(2)
    assert torch.equal(A @ v, before)


def test_the_users_model_is_left_as_it_was():
    p = gallery.cnn()
    p.model.train()
    tensors = {**dict(p.model.named_parameters()), **dict(p.model.named_buffers())}
    before = {name: (id(t), t._version, t.detach().clone()) for name, t in tensors.items()}
    with pytest.warns(TrainModeWarning):
        A = HessianOperator(p.model, p.batches, p.loss_fn, compile=True)
    A @ A.space.random(2)
    after = {**dict(p.model.named_parameters()), **dict(p.model.named_buffers())}
    for name, (identity, version, values) in before.items():
        assert (id(after[name]), after[name]._version) == (identity, version)
        assert torch.equal(after[name], values)
        assert after[name].grad is None
    assert p.model.training


@pytest.mark.parametrize("options", [{}, {"compile": True}])
@pytest.mark.parametrize("write", ["batch", "frozen parameter"])
def test_what_is_used_in_place_may_not_be_written_to(options, write):
    p = gallery.mlp()
    p.model[2].weight.requires_grad_(False)
    A = hessian(p, linearization="keep", **options)
    v = A.space.random(1)[:, 0]
    A @ v
    target = p.batches[0][0] if write == "batch" else p.model[2].weight
    with torch.no_grad():
        target.mul_(2)
    with pytest.raises(DataError, match=r"was written to after.*build a new operator"):
        A @ v


def test_callers_own_what_they_get():
    A = hessian(problem("mlp"), compile=True)
    v = A.space.random(1)[:, 0]
    first = A @ v
    expected = first.clone()
    second = A @ v
    first.zero_()
    assert torch.equal(second, expected)
    assert torch.equal(A @ v, expected)


def test_a_compiled_operator_is_pickled_without_its_programs():
    A = hessian_of_module_level()
    v = A.space.random(1)[:, 0]
    Av = A @ v
    assert torch.equal(pickle.loads(pickle.dumps(A)) @ v, Av)


def hessian_of_module_level():
    p = gallery.mlp()
    return HessianOperator(p.model, p.batches, gallery.cross_entropy, compile=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linearization": "rebuild"}, r"compile=True needs the graphs .* leave out one of"),
        ({"method": "finite_difference"}, "compile=True has nothing to keep: FiniteDifference"),
        ({"method": "forward_over_reverse"}, "compile=True has nothing to keep: ForwardOverRev"),
        ({"pin_data": False}, "compile=True has nothing to keep: pin_data=False"),
        ({"compile": "max-autotune"}, "expected compile to be True or False, got 'max-autotune'"),
        ({"cuda_graphs": 1}, "expected cuda_graphs to be True or False, got 1"),
        ({"cuda_graphs": True}, "cuda_graphs=True expected an operator on a CUDA device, got one"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        hessian(problem("mlp"), **{"compile": True, **options})


def test_graphs_that_do_not_fit_cannot_be_compiled():
    with pytest.raises(MemoryEstimateError, match=r"compile=True needs .* budget of 0 MB; pass"):
        hessian(problem("mlp"), compile=True, memory_budget=0)


def test_a_checkpointed_model_cannot_be_compiled():
    p = gallery.checkpointed()
    with pytest.raises(CheckpointError, match="compile=True has nothing to keep: activation"):
        HessianOperator(p.model, p.batches, p.loss_fn, compile=True)


def test_a_loss_whose_products_leave_torch_is_refused():
    class Loss:
        def __call__(self, outputs, batch):
            return nn.functional.mse_loss(outputs, batch[1])

        def hvp(self, outputs, batch, u):
            return torch.from_numpy(2 / u.numel() * u.numpy())

    p = gallery.regression()
    A = GGNOperator(p.model, p.batches, p.forward_fn, Loss(), compile=True)
    with pytest.raises(CaptureError, match=r"another one .relative error.*leave out compile"):
        A @ A.space.random(1)[:, 0]


# Programs of maps that are no models


def columns(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_what_does_not_depend_on_v_is_computed_once():
    A, V = columns(5, 5), columns(5, 2)
    program = traced(lambda V: A.exp().mul_(2).T @ V, V)
    operations = [n.target for n in program.run.graph.nodes if n.op == "call_function"]
    assert operations == [torch.ops.aten.mm.default]
    torch.testing.assert_close(program(V), 2 * A.exp().T @ V)


def test_programs_are_freed_as_they_are_dropped():
    A, V = columns(5, 5), columns(5, 2)
    program = traced(lambda V: A.exp() @ V, V)
    constant = weakref.ref(program.constants[0])
    gc.disable()
    try:
        del program
        assert constant() is None
    finally:
        gc.enable()


def test_memory_that_is_written_for_every_v_is_made_anew():
    def padded(V):
        out = V.new_zeros(6, V.shape[1])
        out[:4] += V
        return out

    V, W = columns(4, 2), columns(4, 2)
    program = traced(padded, V)
    first = program(V)
    torch.testing.assert_close(program(W), padded(W))
    torch.testing.assert_close(first, padded(V))


def test_memory_that_is_read_before_it_is_written_is_made_anew():
    def product(V):
        a = torch.ones(4, 1, dtype=torch.float64)
        scaled = a * V
        a.mul_(3)
        return scaled + a * V

    V = columns(4, 2)
    program = traced(product, V)
    torch.testing.assert_close(program(V), 4 * V)
    torch.testing.assert_close(program(V), 4 * V)


def test_a_product_that_is_zero_is_new_memory():
    V = columns(4, 2)
    program = traced(lambda V: torch.zeros(4, 2), V)
    program(V).add_(1)
    assert not program(V).any()


def test_entries_picked_by_their_numbers_are_recorded():
    V, W = columns(6, 2), columns(6, 2) + 1
    program = traced(lambda V, last=False: V[[3, 1, 1]] * V[torch.tensor([0, 5, 2])], V)
    assert torch.equal(program(W), W[[3, 1, 1]] * W[[0, 5, 2]])


def absolute(V):
    return V if V.sum() > 0 else -V


def selected(V):
    return V[V[:, 0] > 0]


@pytest.mark.parametrize("product", [absolute, selected])
def test_products_that_ask_for_values_are_refused(product):
    with pytest.raises(CaptureError, match=r"the product asks for values .aten.*leave out compile"):
        traced(product, columns(4, 2))


def test_products_that_draw_random_numbers_are_refused():
    with pytest.raises(CaptureError, match="or at random; leave out compile"):
        Programs(lambda V, last=False: V * torch.rand(4, 1), [])(columns(4, 2))


def test_the_programs_of_the_last_few_widths_are_kept():
    built = []

    def step(program, V):
        built.append(V.shape[1])
        return program

    double = Programs(lambda V, last=False: 2 * V, [step])
    for k in [*range(1, WIDTHS + 2), 2, WIDTHS + 1, 1]:
        V = columns(4, k)
        torch.testing.assert_close(double(V), 2 * V)
    assert built == [*range(1, WIDTHS + 2), 1]


def test_batches_whose_programs_read_alike_are_compiled_once():
    calls = []
    step = Compiled(lambda run: calls.append(run) or run, kinds=("cpu",))
    for M in (columns(4, 4), columns(4, 4)):
        V = columns(4, 2)
        torch.testing.assert_close(Programs(lambda V, M=M, last=False: M @ V, [step])(V), M @ V)
    assert len(calls) == 1


def test_where_nothing_compiles_the_traced_products_are_run_and_a_warning_says_so():
    def fails(run):
        def raises(V, *constants):
            raise RuntimeError("No working C++ compiler found\nlong advice")

        return raises

    step, V = Compiled(fails, kinds=("cpu",)), columns(4, 2)
    double = Programs(lambda V, last=False: 2 * V, [step])
    with pytest.warns(TorchlinopWarning, match=r"torch.compile failed \(RuntimeError: No working"):
        assert torch.equal(double(V), 2 * V)
    V = columns(4, 1)
    assert torch.equal(double(V), 2 * V)  # without a second warning


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of a compiler, when it is first imported
def test_programs_are_compiled_by_inductor():
    p = problem("mlp")
    H = hessian(p)
    batch = p.batches[0]
    with H._maps.at(0, batch) as product:
        compiled = Programs(product, [Compiled(kinds=("cpu",))])
        V = H.space.random(1)
        torch.testing.assert_close(compiled(V), product(V), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(compiled(2 * V), 2 * product(V), rtol=1e-12, atol=1e-14)


def test_operators_without_steps_run_the_kept_product_itself():
    A = hessian(problem("mlp"))
    assert isinstance(A, ObjectiveOperator)
    with A._maps.at(0, problem("mlp").batches[0]) as product:
        assert not isinstance(product, Programs)
