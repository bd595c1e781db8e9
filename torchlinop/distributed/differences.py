"""H v ≈ |v| (∇f(θ₊) − ∇f(θ₋)) / ⟨θ₊ − θ₋, v/|v|⟩: central differences on shards, step measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.batches import Batch
from torchlinop.distributed import fsdp_groups
from torchlinop.distributed.gauss_newton import GaussNewton
from torchlinop.distributed.rank_data import Round
from torchlinop.distributed.sharded_objective import ShardedObjective
from torchlinop.errors import OptionError

log = logging.getLogger("torchlinop")

# The step |θ₊ − θ₋| / 2|θ| where nothing else is known, and the factors that are tried around it.
_STEP = {torch.float64: 1e-6, torch.float32: 1e-4}
_COARSE = 1e-2  # in half precision
_TRIED = (1 / 16, 1 / 4, 1.0, 4.0)  # each is compared with its double


@dataclass(frozen=True)
class CentralDifferences:
    """Differences along the normalised direction; needs no second derivative of anything.

    The shards are written from a copy, so that they return bit by bit, and the quotient is taken
    over the difference θ₊ − θ₋ as it was rounded. Two gradients a product.
    """

    step: float  # relative to |θ|
    error: float = math.nan  # relative, as measured along two directions
    exact = False

    @property
    def name(self) -> str:
        """With step and error, for people."""
        return f"finite_difference, relative step {self.step:.1g}, error about {self.error:.1g}"

    @classmethod
    def usual(cls, objective: ShardedObjective) -> CentralDifferences:
        """With the step that is usual for the precision of the parameters."""
        return cls(_usual_step(objective))

    @classmethod
    def measured(
        cls,
        objective: ShardedObjective,
        product: Callable[[CentralDifferences, Iterable[Round], Tensor], Tensor],
        step: float | None,
        *,
        force: bool,
    ) -> CentralDifferences:
        """Compare the products of several steps with those of their doubles, on one batch.

        Where the error is that of the formula, of second order, the product with the double step
        is off four times as much, and the two differ by three times the error of the finer one
        (Richardson); where it is rounding, by about the error. Twice what they differ by is
        reported. Measured along a random vector and along its product, which leans towards the
        largest eigenvalues: the step that is best for the worse of the two is taken. Costs some 40
        gradients of a batch.

        Raises:
            OptionError: parameters or computation are in half precision, and ``force`` is not
                given; the step is no positive number.
        """
        if step is not None and not step > 0:
            raise OptionError(f"expected a positive fd_step, got {step}; leave it out")
        _refuse_half_precision(objective, force)
        usual = _usual_step(objective)
        steps = [factor * usual for factor in _TRIED] if step is None else [step]
        rounds = objective.first_round()
        random = objective.space.random(1, seed=1)[:, 0]
        with objective.model.borrowed():
            leaning = product(cls(steps[-2] if step is None else step), rounds, random)
            tried = [
                (max(_richardson(objective, product, rounds, v, c) for v in (random, leaning)), c)
                for c in steps
            ]
        error, best = min(tried)
        log.info("finite differences: relative step %.1g, error about %.1g", best, error)
        return cls(best, error)

    def hessian(self, objective: ShardedObjective, rounds: Iterable[Round], v: Tensor) -> Tensor:
        """H v: two gradients."""
        return self._difference(objective, v, lambda: objective.gradient_here(rounds))

    def gauss_newton(
        self, objective: ShardedObjective, rounds: Iterable[Round], JtMJ: GaussNewton, v: Tensor
    ) -> Tensor:
        """``Σ share Jᵀ M J v``: J v from two forward passes, Jᵀ exact."""
        for b, batch, share in rounds:

            def evaluated(b: int = b, batch: Batch = batch) -> Tensor:
                with torch.no_grad():
                    return JtMJ.evaluate(objective, b, batch).clone()

            Jv = self._difference(objective, v, evaluated)
            objective.model.write(objective.model.theta)
            u = JtMJ.weigh(objective, evaluated(), batch, Jv)
            JtMJ.pull(objective, (b, batch, share), u)
        return objective.collected()

    def _difference(
        self, objective: ShardedObjective, v: Tensor, f: Callable[[], Tensor]
    ) -> Tensor:
        """|v| (f(θ₊) − f(θ₋)) / ⟨θ₊ − θ₋, v/|v|⟩; the same numbers divide on all ranks."""
        model, space = objective.model, objective.space
        # By the largest entry first, so that no square under- or overflows.
        largest = space.largest_entry(v)
        if not largest > 0:
            return torch.zeros_like(f())
        scaled = v / largest
        length = space.norm(scaled)
        unit = scaled / length.to(v.dtype)
        size = space.norm(model.theta)
        step = (self.step * torch.where(size > 0, size, 1.0)).to(v.dtype)
        plus = model.write(model.theta + step * unit)
        difference = f()
        minus = model.write(model.theta - step * unit)
        difference -= f()
        moved = space.inner((plus - minus)[:, None], unit[:, None])[0, 0]
        return difference.mul_((length / moved).to(difference.dtype)).mul_(largest)


def _usual_step(objective: ShardedObjective) -> float:
    """That of the coarsest dtype that parameters are stored or used in."""
    return max(_STEP.get(dtype, _COARSE) for dtype in _dtypes(objective))


def _dtypes(objective: ShardedObjective) -> list[torch.dtype]:
    stored = objective.layout.layout.precision
    return [stored, *fsdp_groups.compute_dtypes(objective.model.module)]


def _richardson(
    objective: ShardedObjective,
    product: Callable[[CentralDifferences, Iterable[Round], Tensor], Tensor],
    rounds: list[Round],
    v: Tensor,
    step: float,
) -> float:
    """Twice the relative difference of the products with this step and with its double.

    Infinite if that says nothing: the step was rounded away, or products are not finite.
    """
    fine = product(CentralDifferences(step), rounds, v)
    coarse = product(CentralDifferences(2 * step), rounds, v)
    norm = objective.space.norm
    size = float(norm(fine))
    error = float(2 * norm(coarse - fine)) / size if size else math.inf
    return math.inf if math.isnan(error) else error


def _refuse_half_precision(objective: ShardedObjective, force: bool) -> None:
    coarse = [dtype for dtype in _dtypes(objective) if torch.finfo(dtype).eps > 1e-4]
    if coarse and not force:
        raise OptionError(
            f"finite differences need parameters and computation in float32 at least, got "
            f"{coarse[0]}, which rounds the step away (errors of 0.1 and more of the product); "
            'use method="forward_over_reverse", or pass force=True'
        )
