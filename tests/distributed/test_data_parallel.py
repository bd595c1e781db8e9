"""Over ranks, every matrix is the one that a single process has of the batches of all of them."""

import copy
import io
import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from problems import EVEN, PROBLEMS, UNEQUAL, mlp, of_rank, union
from processes import on_ranks
from torch.nn.parallel import DistributedDataParallel

from torchlinop import (
    EKFACOperator,
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    KFACOperator,
    LambdaOperator,
    as_linear_operator,
    lanczos,
    match_names,
    options,
    spectral_density,
    trace,
)
from torchlinop.bench.collectives import Collectives
from torchlinop.distributed import (
    DDPEmpiricalFisherOperator,
    DDPGGNOperator,
    DDPHessianOperator,
    data_parallel,
)
from torchlinop.errors import OptionError, ProcessGroupError
from torchlinop.progress import products_shown
from torchlinop.testing.gallery import in_batches

# name -> class, whether it takes the outputs and their loss apart, options
MATRICES = {
    "hessian": (HessianOperator, False, {}),
    "hessian by differences": (HessianOperator, False, {"method": "finite_difference"}),
    "hessian, data read again": (HessianOperator, False, {"pin_data": False}),
    "hessian in train mode": (HessianOperator, False, {"mode": "train"}),
    "hessian in microbatches": (HessianOperator, False, {"microbatch_size": 2}),
    "mean over batches": (HessianOperator, False, {"weighting": "batch-mean"}),
    "ggn": (GGNOperator, True, {}),
    "fisher": (FisherOperator, True, {}),
    "sampled fisher": (FisherOperator, True, {"mc_samples": 2}),
    "empirical fisher": (EmpiricalFisherOperator, False, {}),
    "empirical fisher of terms": (EmpiricalFisherOperator, True, {}),
    "empirical fisher of batches": (EmpiricalFisherOperator, False, {"per_sample": False}),
    "kfac": (KFACOperator, True, {}),
    "sampled kfac": (KFACOperator, True, {"fisher_type": "mc", "mc_samples": 2}),
    "ekfac": (EKFACOperator, True, {"separate_weight_and_bias": False}),
}
OF_OUTPUTS = ["ggn", "sampled fisher", "empirical fisher of terms", "kfac", "ekfac"]
# world size -> problem, proportions of the ranks, matrices
TABLE = {
    1: [("mlp", EVEN, ["hessian", "sampled kfac"])],
    2: [
        ("mlp", UNEQUAL, list(MATRICES)),
        ("regression", EVEN, ["hessian", *OF_OUTPUTS]),
        ("tied", UNEQUAL, ["hessian", *OF_OUTPUTS]),
        ("frozen", UNEQUAL, ["hessian", *OF_OUTPUTS]),
        ("gpt2", UNEQUAL, ["hessian", "hessian in train mode", "empirical fisher"]),
        ("llama", UNEQUAL, ["hessian"]),
    ],
    4: [("mlp", UNEQUAL, ["hessian", "sampled kfac"])],
}


def error_of_products(problem, matrix, batches, all_batches):
    """Against the operator of a single process on all batches, relative to its largest entry."""
    kind, of_outputs, options = MATRICES[matrix]
    loss = (problem.forward_fn, problem.criterion) if of_outputs else (problem.loss_fn,)
    op = data_parallel(kind)(problem.model, batches, *loss, **options)
    alone = kind(problem.model, all_batches, *loss, **options)
    expected = alone.matmat(V := op.space.random(3, seed=1))
    return float((op.matmat(V) - expected).abs().max() / expected.abs().max())


def errors_on_this_rank():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    errors = {}
    for name, proportions, matrices in TABLE[world_size]:
        problem = PROBLEMS[name]()
        batches = of_rank(problem, rank, world_size, proportions)
        everything = union(problem, world_size, proportions)
        for matrix in matrices:
            error = error_of_products(problem, matrix, batches, everything)
            errors[f"{matrix} of {name}"] = error
    return errors


@pytest.mark.parametrize("world_size", TABLE)
def test_products_are_those_of_one_process_with_all_batches(world_size):
    for errors in on_ranks(world_size, errors_on_this_rank, timeout=300):
        assert len(errors) == sum(len(matrices) for _, _, matrices in TABLE[world_size])
        assert max(errors.values()) <= 1e-14, errors


def mine(problem):
    """The batches of this rank."""
    return of_rank(problem, dist.get_rank(), dist.get_world_size())


def counted_collectives():
    p = mlp()
    op = data_parallel(HessianOperator(p.model, mine(p), p.loss_fn))
    seen = []
    for V in (op.space.random(1)[:, 0], op.space.random(5)):
        with Collectives() as collectives:
            op @ V
        seen.append(collectives.seen)
    with Collectives() as collectives:
        lanczos(op, k=2, max_iter=20, ncv=20, tol=0, reorthogonalize="none")
    return len(mine(p)), op.size, seen, collectives.seen


def test_a_product_is_one_all_reduce_whatever_the_number_of_batches_and_columns():
    for batches, n, (of_vector, of_block), of_lanczos in on_ranks(2, counted_collectives):
        assert batches in (1, 7)
        assert of_vector == [("all-reduce", 8 * (n + 34))]
        assert of_block == [("all-reduce", 8 * (5 * n + 34))]
        others = [of for of in of_lanczos if of != of_vector[0]]
        assert len(of_lanczos) - len(others) == 20
        assert set(others) <= {("all-reduce", 8)}  # agreement on when to stop, and on memory
        assert len(others) <= 40


def calls_of_hessian_eigenthings():
    p = mlp()
    kwargs = {"model": DistributedDataParallel(p.model), "dataloader": mine(p)}
    op = DDPHessianOperator(
        loss_fn=p.loss_fn,
        param_filter=match_names("2.*"),
        full_dataset=True,
        num_batches=None,
        microbatch_size=4,
        microbatch_unsafe=False,
        method="finite_difference",
        fd_eps=1e-5,
        backend=None,
        **kwargs,
    )
    eigenvalues, _ = lanczos(op, k=3, max_iter=50)
    everything = union(p, dist.get_world_size())
    H = HessianOperator(p.model, everything, p.loss_fn, param_filter=match_names("2.*")).to_dense()
    G = DDPGGNOperator(
        forward_fn=p.forward_fn, loss_of_output_fn=p.criterion, **kwargs
    ) - GGNOperator(p.model, everything, p.forward_fn, p.criterion)
    F = DDPEmpiricalFisherOperator(loss_fn=p.loss_fn, **kwargs) - EmpiricalFisherOperator(
        p.model, everything, p.loss_fn
    )
    expected = torch.linalg.eigvalsh(H).flip(0)[:3]
    return float((eigenvalues - expected).abs().max()), G.to_dense().norm(), F.to_dense().norm()


def test_calls_written_for_hessian_eigenthings_run_on_models_wrapped_in_ddp():
    for of_eigenvalues, of_ggn, of_fisher in on_ranks(2, calls_of_hessian_eigenthings):
        assert of_eigenvalues <= 1e-6  # of differences
        assert max(of_ggn, of_fisher) <= 1e-14


def results_on_this_rank():
    p = mlp()
    return results(data_parallel(HessianOperator)(p.model, mine(p), p.loss_fn))


def results(op):
    density = spectral_density(op, num_runs=2, lanczos_steps=12, seed=3)
    return {
        "lanczos": lanczos(op, k=3, tol=1e-12).eigenvalues,
        "trace": torch.as_tensor(trace(op, num_matvecs=24, seed=3).estimate),
        "spectral_density": torch.as_tensor(density.density),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_algorithms_give_on_all_ranks_what_one_process_gives(world_size):
    p = mlp()
    alone = results(HessianOperator(p.model, p.batches, p.loss_fn))
    for here in on_ranks(world_size, results_on_this_rank):
        for which, expected in alone.items():
            error = (here[which] - expected).abs().max()
            assert error <= 1e-10 * expected.abs().max(), which


def raises_on_rank_1(model, batch):
    if dist.get_rank() == 1 and not torch.is_inference_mode_enabled() and raises_on_rank_1.armed:
        raise RuntimeError("the loss failed")
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


raises_on_rank_1.armed = False


def a_failing_loss(at_construction):
    p = mlp()
    before = copy.deepcopy(p.model.state_dict())
    raises_on_rank_1.armed = at_construction
    message = None
    try:
        op = data_parallel(HessianOperator)(
            p.model, mine(p), raises_on_rank_1, linearization="rebuild"
        )
        raises_on_rank_1.armed = True
        op @ op.space.random(1)
    except Exception as error:
        message = type(error).__name__, str(error)
    raises_on_rank_1.armed = False
    unchanged = all(torch.equal(before[n], t) for n, t in p.model.state_dict().items())
    own = all(type(q) is torch.nn.Parameter and q.grad is None for q in p.model.parameters())
    op = data_parallel(HessianOperator)(p.model, mine(p), raises_on_rank_1)
    alone = HessianOperator(p.model, union(p, dist.get_world_size()), raises_on_rank_1)
    v = op.space.random(1)
    return message, unchanged and own, float((op @ v - alone @ v).abs().max())


def failing_losses():
    return [a_failing_loss(at_construction) for at_construction in (True, False)]


def test_a_loss_that_fails_on_one_rank_ends_all_and_leaves_the_model_as_it_was():
    for when in on_ranks(2, failing_losses):
        for (kind, sentence), untouched, later in when:
            assert (kind, sentence) == ("RuntimeError", "on rank 1 of 2: the loss failed")
            assert untouched
            assert later <= 1e-14


def different(what):
    p, rank = mlp(), dist.get_rank()
    options, data = {}, mine(p)
    if what == "values" and rank:
        p.model[2].bias.data[0] += 1e-9
    if what == "shapes" and rank:
        p.model[2] = torch.nn.Linear(5, 3, bias=False).double()
    if what == "mode":
        options["mode"] = ["eval", "train"][rank]
    if what == "weights" and rank:
        options["weight"] = lambda batch: 1.0
    if what == "options" and rank:
        options["method"] = "forwards"
    if what == "no batch" and rank:
        data = []
    if what == "no loss term" and rank:
        data = [(torch.randn(2, 6).double(), torch.full((2,), -100))]
    op = data_parallel(HessianOperator)(p.model, data, p.loss_fn, **options)
    v = op.space.random(1, seed=rank)[:, 0]
    lanczos(op, k=1, v0=-v if rank else v) if what == "v0" else op @ v


def told_of(cases):
    told = {}
    for what in cases:
        try:
            different(what)
        except Exception as error:
            told[what] = type(error).__name__, str(error)
    return told


DIFFERENCES = {
    "values": ("ProcessGroupError", "the ranks hold different values of 2.bias (ranks 0 and 1)"),
    "shapes": ("ProcessGroupError", "the ranks differ in a parameter or buffer, 2.bias: (3,)"),
    "mode": ("ProcessGroupError", "the ranks differ in mode: 'eval' on rank 0, 'train' on rank 1"),
    "weights": ("WeightingError", "the ranks weigh their batches differently, by samples and"),
    "options": ("OptionError", "on rank 1 of 2: unknown method 'forwards'"),
    "no batch": ("EmptyDataError", "on rank 1 of 2: the data gave no batches; pass a list"),
    "no loss term": ("EmptyDataError", "on rank 1 of 2: the data hold no loss term"),
    "vectors": ("DivergenceError", "the ranks passed different vectors to a product"),
    "v0": ("DivergenceError", "the ranks passed different vectors to a product"),
}


def test_ranks_that_differ_are_all_told_so():
    here, there = on_ranks(2, told_of, list(DIFFERENCES))
    assert here == there
    for what, (kind, sentence) in DIFFERENCES.items():
        assert here[what][0] == kind
        assert here[what][1].startswith(sentence)


class Interrupting(KFACOperator):
    """A matrix whose products are interrupted by a signal, and noted."""

    def _matmat(self, V):
        os.kill(os.getpid(), signal.SIGINT)
        return super()._matmat(V)


def interrupted_on_one_rank():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    p = mlp()

    def loss_fn(model, batch):
        if len(seen) == 6 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return p.loss_fn(model, batch)

    seen = []
    op = data_parallel(HessianOperator)(p.model, mine(p), loss_fn, linearization="rebuild")
    multiply = op._matmat
    op._matmat = lambda V: seen.append(V) or multiply(V)
    handler = signal.getsignal(signal.SIGINT)
    found = lanczos(op, k=2, ncv=20, tol=1e-6)
    assert signal.getsignal(signal.SIGINT) is handler
    K = data_parallel(Interrupting)(p.model, mine(p), p.forward_fn, p.criterion)
    with pytest.raises(KeyboardInterrupt):
        lanczos(K, k=2)
    return found.status, found.matvecs, found.eigenvalues


@pytest.mark.filterwarnings("ignore")
def test_an_interruption_of_one_rank_ends_all_after_the_same_product():
    first, second = on_ranks(2, interrupted_on_one_rank)
    assert first[:2] == second[:2] == ("interrupted", 5)
    assert torch.equal(first[2], second[2])


def test_without_a_process_group_it_says_how_to_make_one():
    p = mlp()
    with pytest.raises(ProcessGroupError, match="is not initialised; call"):
        DDPHessianOperator(p.model, p.batches, p.loss_fn)


def refusals():
    p = mlp()
    for of_no_data in (LambdaOperator, LambdaOperator(3, lambda v: v)):
        with pytest.raises(OptionError, match="LambdaOperator; make data_parallel of each part"):
            data_parallel(of_no_data)
    with pytest.raises(OptionError, match="expected no backend, got a module"):
        DDPHessianOperator(p.model, p.batches, p.loss_fn, backend=torch)


def test_matrices_without_data_and_backends_are_refused():
    on_ranks(1, refusals)


def of_labels_that_only_ranks_together_tell_apart():
    """Rank 0 has full sequences, rank 1 half masked ones: each alone, samples count the same."""
    p = PROBLEMS["gpt2"]()
    tokens = p.full_batch["input_ids"][:4]
    mask = torch.ones_like(tokens)
    labels = tokens.clone()
    labels[2:, 4:] = -100
    rows = [{"input_ids": tokens, "attention_mask": mask, "labels": labels}]
    halves = in_batches(rows[0], 2, 2)
    op = data_parallel(HessianOperator)(p.model, [halves[dist.get_rank()]], p.loss_fn)
    alone = HessianOperator(p.model, rows, p.loss_fn)
    v = op.space.random(1)
    return float((op @ v - alone @ v).norm() / (alone @ v).norm())


def of_sums():
    p = mlp()

    def total(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    op = data_parallel(HessianOperator(p.model, mine(p), total))
    alone = HessianOperator(p.model, union(p, dist.get_world_size()), total)
    again = data_parallel(op)
    assert as_linear_operator(again).shape == op.shape
    return float((again.to_dense() - alone.to_dense()).norm())


def errors_of_weights():
    return of_labels_that_only_ranks_together_tell_apart(), of_sums()


def test_weights_are_found_on_batches_of_all_ranks_and_sums_are_summed():
    for errors in on_ranks(2, errors_of_weights):
        assert max(errors) <= 1e-13


def shown_bar():
    sys.stderr = written = io.StringIO()
    with options(progress=True), products_shown(True, total=3) as advance:
        advance(3)
    sys.stderr = sys.__stderr__
    return written.getvalue()


def test_of_several_ranks_the_first_shows_progress():
    first, *others = on_ranks(3, shown_bar)
    assert "3/3" in first
    assert others == ["", ""]
