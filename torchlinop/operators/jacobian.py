"""J = ∂ outputs / ∂ θ, the Jacobian of the model's outputs on all data: (m, n)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.compiled import Step, as_programs
from torchlinop.derivatives import Derivative, Function, Linearized
from torchlinop.finiteness import refuse_non_finite_outputs
from torchlinop.from_model import objective_from_model
from torchlinop.losses.functions import refuse_unfit_function
from torchlinop.losses.of_model import ForwardFn, outputs_of
from torchlinop.operators.of_objective import (
    ProductOptions,
    planned,
    refuse_coarse_differences,
)
from torchlinop.operators.rectangular import RectangularOperator
from torchlinop.preflight import preflight
from torchlinop.space import VectorSpace


@dataclass(frozen=True)
class _Outputs:
    forward: ForwardFn

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return outputs_of(self.forward, model, batch)


@dataclass(frozen=True)
class _Sum:
    """A scalar that has a graph, for an objective that is only asked for its outputs."""

    outputs: _Outputs

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.outputs(model, batch).sum()


@dataclass(frozen=True)
class _Linearization:
    derivative: Derivative
    of: _Outputs
    steps: tuple[Step, ...]

    def __call__(self, f: Function, theta: Tensor, start: int, batch: Batch) -> Linearized:
        local = self.derivative.linearize(f, theta)
        push, pull = (as_programs(A, self.steps) for A in (local.push, local.pull))
        return Linearized(local.outputs, push, pull)


class JacobianOperator(RectangularOperator):
    """The Jacobian of ``forward_fn(model, batch)``, unweighted: one row for every output.

    Rows are in the order of the data, outputs row-major within a batch; columns are θ. ``J.T`` is
    its transpose, and ``as_linear_operator(J)`` has both, as ``scipy.sparse.linalg.svds`` wants:
    the squared singular values are the eigenvalues of the neural tangent kernel J Jᵀ.

    Args: as for ``GGNOperator``, without a loss.

    Costs two gradients of the first batch to build, and a forward pass of all data. J v and Jᵀ u
    cost about two thirds of a gradient each with kept graphs; memory as for a Hessian.

    Raises: as ``GGNOperator``.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        forward_fn: ForwardFn,
        **options: Unpack[ProductOptions],
    ) -> None:
        plan, rest = planned(options)
        refuse_unfit_function("forward_fn", forward_fn)
        outputs = _Outputs(forward_fn)
        # Every output is a row, whatever the batches count.
        rest["weighting"], rest["weight"] = "batch-mean", None
        objective = objective_from_model(model, dataloader, _Sum(outputs), **rest)
        objective.data.refuse_reordering()
        facts = preflight(objective, plan.derivative.exact, outputs)
        refuse_coarse_differences(plan.derivative, objective, facts)
        objective = replace(objective, writes=facts.writes)
        self.objective = objective
        self._of = outputs
        work = _Linearization(plan.derivative, outputs, plan.steps)
        self._at = plan.carry_out(objective, facts, work)
        self._sizes = [self._count(b, batch) for b, batch in self._batches()]
        space = objective.space
        super().__init__(
            VectorSpace(sum(self._sizes), space.dtype, space.device),
            space,
            description=[*objective.description[:1], plan.described(self._at)],
        )
        self.layout = objective.layout

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        for b, (batch, _) in enumerate(self.objective.data):
            yield b, batch

    def _count(self, b: int, batch: Batch) -> int:
        with self.objective.evaluating(b, batch, self._of) as f, torch.no_grad():
            outputs = f(self.objective.theta)
        refuse_non_finite_outputs(outputs, b)
        return outputs.numel()

    def _matmat(self, V: Tensor) -> Tensor:
        parts = []
        for b, batch in self._batches():
            with self._at.at(b, batch) as local:
                parts.append(self._at.columns.apply(local.push, V, last=self._at.last))
        return torch.cat(parts).to(V.dtype)

    def _rmatmat(self, U: Tensor) -> Tensor:
        total = U.new_zeros(self.space.size, U.shape[1])
        pieces = U.split(self._sizes)
        for (b, batch), piece in zip(self._batches(), pieces, strict=True):
            with self._at.at(b, batch) as local:
                total += self._at.columns.apply(local.pull, piece, last=self._at.last)
        return total
