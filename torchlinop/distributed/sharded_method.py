"""Which way of differentiating a sharded model is possible, is chosen, and passes a test."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable
from typing import Protocol, get_args

import torch
from torch import Tensor

from torchlinop.choices import refuse_unknown
from torchlinop.distributed import fsdp_groups
from torchlinop.distributed.differences import CentralDifferences
from torchlinop.distributed.forward_over_reverse import DualNumbers
from torchlinop.distributed.gauss_newton import GaussNewton
from torchlinop.distributed.rank_data import Round
from torchlinop.distributed.sharded_from_model import Sharding, sharding_of
from torchlinop.distributed.sharded_objective import ShardedObjective
from torchlinop.distributed.sharded_options import MethodName, MethodOptions
from torchlinop.distributed.tensor_parallel import DoubleBackward
from torchlinop.errors import DoubleBackwardError, NonFiniteError, OptionError, ShardingError

log = logging.getLogger("torchlinop")

# What torch says of operations that forward mode cannot pass through.
_NO_RULE = re.compile("forward AD|forward mode AD|ZeroTensors|jvp")

# A product is wrong, not rounded, if it is off by more than this from differences that are sure of
# themselves; half precision reaches 0.01.
_WRONG, _UNSURE = 0.1, 0.3


class Method(Protocol):
    """A way to multiply; its methods are called on all ranks, while the model is borrowed."""

    @property
    def name(self) -> str: ...
    @property
    def exact(self) -> bool: ...
    @property
    def error(self) -> float: ...  # of a product, relative; 0 if exact but for rounding

    def hessian(self, objective: ShardedObjective, rounds: Iterable[Round], v: Tensor) -> Tensor:
        """``Σ share H_b v``, the local vector."""
        ...

    def gauss_newton(
        self, objective: ShardedObjective, rounds: Iterable[Round], JtMJ: GaussNewton, v: Tensor
    ) -> Tensor:
        """``Σ share J_bᵀ M_b J_b v``, the local vector."""
        ...


# (method, rounds, v) -> A v
Product = Callable[[Method, Iterable[Round], Tensor], Tensor]

_EXACT: dict[Sharding, Callable[[], Method]] = {"fsdp": DualNumbers, "tp": DoubleBackward}


def prepared(
    objective: ShardedObjective, product: Product, options: MethodOptions
) -> tuple[Method, str]:
    """The method for these products, which has been tried, and what there is to say about it.

    Raises:
        OptionError: the method cannot be had for a model that is sharded so.
        DoubleBackwardError: an operation of the model has no forward derivative, and no other
            method may be taken.
        ShardingError: a product is not that of finite differences.
    """
    name, sharding = options.method, sharding_of(objective.model.module)
    objective.together(lambda: refuse_impossible(name, sharding))
    exact = _EXACT.get(sharding)
    reason = f"no exact method for {sharding}" if exact is None else ""
    if name != "finite_difference" and exact is not None:
        method = exact()
        trial, reason = _tried(method, objective, product)
        if trial is not None:
            # What is not finite is told by the first product, of all data.
            finite = not objective.space.agree(not bool(torch.isfinite(trial).all()))
            if options.self_test and finite:
                _compare(trial, method, objective, product)
            return method, method.name
        if name != "auto":
            raise DoubleBackwardError(
                f"an operation of the model has no forward derivative in torch ({reason}); "
                'pass method="finite_difference", or write the operation as a formula'
            )
    differences = CentralDifferences.measured(
        objective, product, options.fd_step, force=options.force
    )
    if reason:
        log.info("products by finite differences: %s", reason)
    return differences, f"{differences.name}{f' ({reason})' if reason else ''}"


def refuse_impossible(name: str, sharding: Sharding) -> None:
    """Raise OptionError for a method that there is not, for a model that is sharded so."""
    refuse_unknown("method", name, get_args(MethodName))
    if name == "autograd" and sharding != "tp":
        raise OptionError(
            "fully_shard gathers parameters outside of autograd's graph, so that gradients cannot "
            'be differentiated by a second backward pass; method="forward_over_reverse" is as '
            "exact (for FSDP2 and HSDP), and the default"
        )
    if name == "forward_over_reverse" and sharding != "fsdp":
        raise OptionError(
            "torch has no forward derivatives for DTensor's functions of autograd; "
            'use method="autograd" for a tensor-parallel model, "finite_difference" for FSDP2 of '
            "tensor-parallel parameters"
        )


def _tried(
    method: Method, objective: ShardedObjective, product: Product
) -> tuple[Tensor | None, str]:
    """A product of one batch, or why it cannot be taken."""
    try:
        with objective.model.borrowed():
            return product(method, objective.first_round(), _direction(objective)), ""
    except (RuntimeError, NotImplementedError) as error:
        if not _NO_RULE.search(str(error)):
            raise
        return None, str(error).splitlines()[0]


def _compare(exact: Tensor, method: Method, objective: ShardedObjective, product: Product) -> None:
    """Raise ShardingError unless the product of one batch is that of finite differences.

    Those of the usual step at first; only where they are far off is the best step looked for.

    Raises:
        NonFiniteError: there are no differences to compare with.
    """
    rounds = objective.first_round()
    differences = CentralDifferences.usual(objective)
    for _ in range(2):
        with objective.model.borrowed():
            rough = product(differences, rounds, _direction(objective))
        error = _relative(objective, rough, exact)
        if error <= max(_WRONG, 0.0 if math.isnan(differences.error) else differences.error):
            return
        if math.isnan(differences.error):
            differences = CentralDifferences.measured(objective, product, None, force=True)
    if math.isnan(error):
        raise NonFiniteError(
            f"the product by {method.name} is finite, but gradients beside the parameters are NaN "
            f"or infinite, at a distance of {differences.step:.1g} |θ| and others: the loss is "
            "close to where it is not defined, or overflows. Move the parameters, or smooth the "
            "loss; self_test=False goes without this comparison"
        )
    if differences.error > _UNSURE:
        log.info("%s not compared: differences are off by %.1g", method.name, differences.error)
        return
    note = fsdp_groups.version_note() or f"torch {torch.__version__}"
    raise ShardingError(
        f"the product by {method.name} differs by {error:.2g} from finite differences, whose "
        f"error is about {differences.error:.1g} ({note}); "
        'pass method="finite_difference", or self_test=False if the loss has kinks'
    )


def _relative(objective: ShardedObjective, rough: Tensor, exact: Tensor) -> float:
    norm = objective.space.norm
    size = float(norm(rough).maximum(norm(exact)))
    return float(norm(exact - rough)) / size if size else 0.0


def _direction(objective: ShardedObjective) -> Tensor:
    return objective.space.random(1, seed=0)[:, 0]
