"""Σ_b share_b A_b: a matrix that is built of the model at θ, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from torchlinop.choices import refuse_unknown, refuse_unknown_options
from torchlinop.compiled import Compiled, Step
from torchlinop.cuda_graph import CudaGraphs
from torchlinop.derivatives import (
    Derivative,
    FiniteDifference,
    ForwardOverReverse,
    LinearMap,
    ReverseOverReverse,
)
from torchlinop.errors import OptionError
from torchlinop.finiteness import refuse_non_finite
from torchlinop.from_model import ObjectiveOptions
from torchlinop.linearization import AsPrograms, LinearizationPlan, Policy, Work, mean_product
from torchlinop.objective import Objective
from torchlinop.operators.base import CurvatureOperator
from torchlinop.preflight import Preflight, preflight
from torchlinop.ranks import Ranks
from torchlinop.union import united

Method = Literal["autograd", "forward_over_reverse", "finite_difference"]


class ProductOptions(ObjectiveOptions, total=False):
    """Further keywords of every operator whose products go through the model."""

    # "autograd" (reverse over reverse, exact; the default), "forward_over_reverse" (exact, less
    # memory), "finite_difference" (central differences), or a Derivative.
    method: Method | Derivative
    # Euclidean length of the finite difference's step, by default u^(1/3) (1 + ‖θ‖).
    fd_eps: float | None
    # "keep" the graphs at θ between products, "rebuild" them for each, or "auto" (the default):
    # keep them if they take at most memory_budget bytes, by default half of the free memory.
    linearization: Policy
    memory_budget: int | None
    column_chunk: int | None  # columns of a block that go through one pass; measured by default
    # Run the kept products as programs, traced at the first block of every width: without the
    # overhead of autograd, and compiled by torch.compile on a GPU. Default False.
    compile: bool
    # Replay the kept products as CUDA graphs, captured for every batch and width, the last four
    # widths at most. Default False.
    cuda_graphs: bool


class ObjectiveOperator(CurvatureOperator):
    """The mean over batches of matrices that differentiating the model gives.

    Subclasses say in their constructor what is differentiated.
    """

    def __init__(
        self,
        objective: Objective,
        work: Work[LinearMap],
        plan: LinearizationPlan,
        *,
        positive_semidefinite: bool = False,
    ) -> None:
        facts = preflight(objective, plan.derivative.exact, work.of)
        refuse_coarse_differences(plan.derivative, objective, facts)
        objective = replace(objective, writes=facts.writes)
        self.objective = objective
        self._maps = plan.carry_out(objective, facts, AsPrograms(work, plan.steps))
        self._proven_finite = False
        super().__init__(
            objective.space,
            layout=objective.layout,
            description=[*objective.description, plan.described(self._maps)],
            notes=[*facts.notes(objective), facts.memory_note],
            # The errors of finite differences have any sign.
            positive_semidefinite=positive_semidefinite and plan.derivative.exact,
        )

    def _matmat(self, V: Tensor) -> Tensor:
        AV = mean_product(self.objective, self._maps, V)
        # Once, as it makes the host wait for the device; a NaN in V is the caller's own.
        if not self._proven_finite and torch.isfinite(V).all():
            if not torch.isfinite(AV).all():
                refuse_non_finite(self.objective, AV)
            self._proven_finite = True
        return AV

    def unite(self, ranks: Ranks) -> None:
        """Make this the matrix of the data of all ranks: products are summed over them.

        Raises:
            ProcessGroupError, WeightingError: see ``united``.
        """
        self.objective = united(self.objective, ranks)
        self._maps = self._maps.of(self.objective)
        self._proven_finite = False
        self.space = self.objective.space
        self.description = (*self.objective.description, self.description[-1])

    @property
    def linearization(self) -> str:
        """What was decided about the graphs at θ: "kept" or "rebuilt"."""
        return self._maps.name

    def loss(self) -> Tensor:
        """The mean loss: a scalar."""
        return self.objective.loss()

    def gradient(self) -> Tensor:
        """The gradient of the mean loss: (n,)."""
        return self.objective.gradient()


def planned(options: ProductOptions) -> tuple[LinearizationPlan, ObjectiveOptions]:
    """The plan for products, and what is left of the options for the objective.

    Raises:
        OptionError: an option has a value that is not among its choices.
    """
    refuse_unknown_options(options, ProductOptions.__optional_keys__)
    method = options.pop("method", "autograd")
    plan = LinearizationPlan(
        derivative_of(method, options.pop("fd_eps", None)),
        options.pop("linearization", "auto"),
        options.pop("memory_budget", None),
        options.pop("column_chunk", None),
        method if isinstance(method, str) else repr(method),
        _steps(options.pop("compile", False), options.pop("cuda_graphs", False)),
    )
    return plan, options


def _steps(compile: bool, cuda_graphs: bool) -> tuple[Step, ...]:
    for name, value in [("compile", compile), ("cuda_graphs", cuda_graphs)]:
        if not isinstance(value, bool):
            raise OptionError(f"expected {name} to be True or False, got {value!r}; leave it out")
    steps: list[Step] = [Compiled()] if compile else []
    return (*steps, CudaGraphs()) if cuda_graphs else (*steps,)


_METHODS: dict[str, Callable[[float | None], Derivative]] = {
    "autograd": lambda step: ReverseOverReverse(),
    "forward_over_reverse": lambda step: ForwardOverReverse(),
    "finite_difference": FiniteDifference,
}


def derivative_of(method: Method | Derivative, fd_eps: float | None) -> Derivative:
    """The derivative that a user's ``method`` names.

    Raises:
        OptionError: no such method, or a step length where there is no step.
    """
    if fd_eps is not None and not (method == "finite_difference" and fd_eps > 0):
        raise OptionError(
            f"fd_eps is the positive step length of method='finite_difference', "
            f"got fd_eps={fd_eps} with method={method!r}; leave it out"
        )
    if isinstance(method, type):
        raise OptionError(f"expected a Derivative, got a class; pass {method.__name__}()")
    if not isinstance(method, str):
        return method
    refuse_unknown("method", method, _METHODS)
    return _METHODS[method](fd_eps)


def refuse_coarse_differences(
    derivative: Derivative, objective: Objective, facts: Preflight
) -> None:
    """Raise OptionError where a step, or the difference it makes, is rounded away."""
    coarsest = objective.layout.precision
    if coarsest != objective.space.dtype and not derivative.exact:
        raise OptionError(
            f"finite differences need all parameters in {objective.space.dtype}, the dtype of the "
            f"vectors, got some in {coarsest}, which rounds the step away; "
            'use method="autograd", or model.float() before the operator is built'
        )
    if facts.dtype != objective.space.dtype and not derivative.exact:
        raise OptionError(
            f"finite differences need a model that computes in {objective.space.dtype}, the dtype "
            f"of the vectors, got values in {facts.dtype}; "
            'use method="autograd", or bring model and loss to one dtype'
        )
