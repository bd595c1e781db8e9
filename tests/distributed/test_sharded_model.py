"""Sharded models as they are used: with optimizers in the backward pass, and training on."""

import copy

import problems
import pytest
import torch
import torch.distributed as dist
from processes import failures, on_ranks
from test_fully_sharded import pytestmark, relative, sharded  # noqa: F401
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.nn.functional import cross_entropy

from torchlinop import HessianOperator, match_names
from torchlinop.distributed.fully_sharded import FSDPHessianOperator

_TIES_ARE_KNOWN = "_orig_param_uid" in FSDPParam.__annotations__


def pair(model, make=sharded, loss_fn=None, **options):
    """The operator of the model in shards, and of one process; the models of both."""
    problem = problems.mlp()
    loss_fn, rank, ranks = loss_fn or problem.loss_fn, dist.get_rank(), dist.get_world_size()
    shards = make(copy.deepcopy(model))
    own, union = problems.of_rank(problem, rank, ranks), problems.union(problem, ranks)
    A = FSDPHessianOperator(shards, own, loss_fn, **options)
    return A, HessianOperator(model, union, loss_fn, **options), shards


def error(A, reference):
    V = reference.space.random(2, seed=3)
    return relative(A.space.gather(A @ A.space.scatter(V)), reference @ V)


def while_training_goes_on():
    """Parameters that are left out are trained as well."""
    A, reference, shards = pair(problems.mlp().model, param_filter=match_names("2.*"))
    expected = reference.to_dense()
    with torch.no_grad():
        for p in shards.parameters():
            p.mul_(1.5)
    before = [p.detach().to_local().clone() for p in shards.parameters()]
    found = A.space.gather(A @ A.space.scatter(torch.eye(A.size).double()))
    after = [p.detach().to_local() for p in shards.parameters()]
    assert all(map(torch.equal, before, after))
    return relative(found, expected)


def with_an_optimizer_in_the_backward_pass():
    def make(model):
        model = sharded(model)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        return model

    def step(p):
        p.data.add_(p.grad, alpha=-0.1)
        steps.append(p)

    steps = []
    A, reference, shards = pair(problems.mlp().model, make)
    found = error(A, reference)
    assert not steps
    cross_entropy(shards(torch.ones(2, 6).double()), torch.tensor([0, 1])).backward()
    assert len(steps) == 4
    return found


class Scaled(nn.Module):
    """With a parameter of one entry, of which the second rank has nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.layer(x).tanh() * self.scale


def of_one_entry():
    A, reference, _ = pair(Scaled().double(), fully_shard)
    return error(A, reference)


class Recurrent(nn.Module):
    """An LSTM, which accepts no other tensors than parameters as its attributes."""

    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(2, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cells(x.view(-1, 3, 2))[0][:, -1])


def of_an_lstm():
    def make(model):
        fully_shard(model.cells)
        return fully_shard(model)

    A, reference, _ = pair(Recurrent().double(), make)
    assert A.error_estimate == 0
    return error(A, reference)


def with_a_hook_that_scales_gradients():
    A, reference, shards = pair(problems.mlp().model)
    hook = shards[0].register_full_backward_hook(
        lambda module, grad_in, grad_out: (grad_in[0] * 2,)
    )
    found = error(A, reference)
    assert hook.id in shards[0]._backward_hooks
    return found


def errors():
    of_training = while_training_goes_on(), with_an_optimizer_in_the_backward_pass()
    return *of_training, with_a_hook_that_scales_gradients(), of_one_entry(), of_an_lstm()


def test_products_are_of_the_model_as_it_was_and_take_no_step_of_an_optimizer():
    for of_all in on_ranks(2, errors):
        assert max(of_all) <= 1e-14, of_all


def penalised(model, batch):
    decay = sum(p.full_tensor().square().sum() for p in model.parameters())
    return cross_entropy(model(batch[0]), batch[1]) + 1e-3 * decay


def with_weight_decay_in_the_loss():
    problem = problems.mlp()
    data = problems.of_rank(problem, dist.get_rank(), dist.get_world_size())
    FSDPHessianOperator(sharded(problem.model), data, penalised, weighting="batch-mean")


def test_a_loss_that_takes_shards_from_the_model_is_refused():
    told = failures(2, with_weight_decay_in_the_loss)
    assert set(told) == {told[0]}
    assert told[0][0] == "ShardingError"
    assert told[0][1].startswith("the loss uses the shards of 0.weight and 3 more directly, and")
    assert told[0][1].endswith("a weight decay of λ|θ|²/2 is a damping of λ")


def tied_across_groups():
    problem = problems.tied()
    model = problem.model
    for part in model.children():
        fully_shard(part)
    FSDPHessianOperator(fully_shard(model), problem.batches, problem.loss_fn)


@pytest.mark.skipif(not _TIES_ARE_KNOWN, reason="this torch takes them for two parameters")
def test_parameters_tied_across_groups_are_refused():
    for kind, message in failures(2, tied_across_groups):
        assert kind == "ShardingError"
        assert "got embed.weight in one and head.weight in another" in message
        assert message.endswith("call fully_shard([a, b]) on the modules that share it")


class Multiplied(nn.Module):
    """Products of features, by an operation whose forward rule is wrong in torch."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 4), nn.Linear(2, 3)

    def forward(self, x):
        x = self.up(x)
        where = torch.tensor([[0, 0, 1, 1]] * len(x))
        return self.down(x.new_ones(len(x), 2).scatter_reduce(1, where, x, "prod"))


def with_a_wrong_forward_rule():
    A, reference, _ = pair(Multiplied().double(), fully_shard)
    return A.method, str(A), error(A, reference)


def test_a_forward_rule_that_is_wrong_is_not_used():
    for method, described, off in on_ranks(2, with_a_wrong_forward_rule):
        assert method.startswith("finite_difference")
        assert "forward AD of scatter_reduce" in described
        assert off <= 1e-7


def after_a_forward_pass():
    """Which leaves what the outermost group has, the second layer, gathered."""

    def make(model):
        fully_shard(model[0])
        fully_shard(model)
        model(torch.ones(2, 6).double())
        return model

    A, reference, _ = pair(problems.mlp().model, make)
    return error(A, reference)


def test_an_operator_may_be_built_after_a_forward_pass():
    assert max(on_ranks(2, after_a_forward_pass)) <= 1e-14
