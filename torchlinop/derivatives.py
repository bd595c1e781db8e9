"""Ways to differentiate a scalar function twice: maps V ↦ H V that share the work done at θ."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

ScalarFunction = Callable[[Tensor], Tensor]

# What torch says of operations that forward mode, or a batch of it, cannot pass through.
_NO_RULE = re.compile(
    "NotImplementedError|forward.?(mode )?AD|ZeroTensors|vmap|functorch|torch.func"
)

log = logging.getLogger("torchlinop")


class HessianMap(Protocol):
    """``V ↦ H V`` for blocks (n, k), all columns in one pass; ``last`` lets it free its memory."""

    def __call__(self, V: Tensor, *, last: bool = False) -> Tensor: ...


class Derivative(Protocol):
    """A way to differentiate a scalar function of a flat vector (n,) twice."""

    @property
    def shares_work(self) -> bool:
        """Whether the map holds work done at theta, worth keeping between products."""
        ...

    @property
    def exact(self) -> bool:
        """Whether second derivatives are taken by autograd."""
        ...

    def hvp(self, f: ScalarFunction, theta: Tensor) -> HessianMap:
        """The Hessian of ``f`` at ``theta`` as a map of blocks."""
        ...


def gradient_of(f: ScalarFunction, theta: Tensor, *, create_graph: bool = False) -> Tensor:
    """∇f(θ), zero where f does not depend on θ. ``create_graph`` links it to a theta with grad."""
    theta = theta if create_graph else theta.detach().requires_grad_()
    with torch.enable_grad():
        value = f(theta)
        if not value.requires_grad:
            return torch.zeros_like(theta, requires_grad=False)
        (gradient,) = torch.autograd.grad(value, theta, create_graph=create_graph)
    return gradient


@dataclass(frozen=True)
class ReverseOverReverse:
    """Exact: reverse mode through the graph of the gradient, which is built once.

    Costs about one gradient to build, about two a column; memory of two activation graphs.
    """

    shares_work = True
    exact = True

    def hvp(self, f: ScalarFunction, theta: Tensor) -> HessianMap:
        theta = theta.detach().requires_grad_()
        gradient = gradient_of(f, theta, create_graph=True)

        def product(V: Tensor, *, last: bool = False) -> Tensor:
            if not gradient.requires_grad:  # f is linear, or constant
                return torch.zeros_like(V)
            block = V.shape[1] > 1
            (HV,) = torch.autograd.grad(
                gradient,
                theta,
                V.mT if block else V[:, 0],
                retain_graph=not last,
                is_grads_batched=block,
                materialize_grads=True,
            )
            return HV.mT if block else HV[:, None]

        return product


@dataclass
class ForwardOverReverse:
    """Exact: forward mode through the gradient; nothing is kept, so memory stays at two gradients.

    Costs about four gradients a column. Where an operation has no forward rule, all further
    products are taken by ``fallback``, and the log says so once.
    """

    fallback: Derivative = ReverseOverReverse()
    _without_rule: bool = field(default=False, init=False, repr=False)
    shares_work = False
    exact = True

    def hvp(self, f: ScalarFunction, theta: Tensor) -> HessianMap:
        theta = theta.detach()
        gradient = torch.func.grad(f)
        fallback: list[HessianMap] = []

        def column(v: Tensor) -> Tensor:
            with warnings.catch_warnings():
                # The first forward derivative of a process makes torch use what it deprecates.
                warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
                warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
                tangent: Tensor = torch.func.jvp(gradient, (theta,), (v,))[1]
            return tangent

        def forward(V: Tensor) -> Tensor:
            if V.shape[1] == 1:
                return column(V[:, 0])[:, None]
            return torch.func.vmap(column, randomness="same")(V.mT).mT

        def product(V: Tensor, *, last: bool = False) -> Tensor:
            if not self._without_rule:
                try:
                    return forward(V)
                except RuntimeError as error:
                    if not _NO_RULE.search(f"{type(error).__name__}: {error}"):
                        raise
                    log.info("no forward-over-reverse product, using %s: %s", self.fallback, error)
                    self._without_rule = True
            if not fallback:
                fallback.append(self.fallback.hvp(f, theta))
            return fallback[0](V, last=last)

        return product


@dataclass(frozen=True)
class FiniteDifference:
    """Central differences of gradients: the memory of one gradient, an error of order u^(2/3).

    The step along a direction v has Euclidean length ``step``, by default u^(1/3) (1 + ‖θ‖)
    with u the unit roundoff, whatever the length of v; the quotient is taken over the
    difference θ₊ − θ₋ as it was rounded. Costs two gradients a column.
    """

    step: float | None = None
    shares_work = False
    exact = False

    def hvp(self, f: ScalarFunction, theta: Tensor) -> HessianMap:
        theta = theta.detach()
        roundoff = torch.finfo(theta.dtype).eps / 2
        step = self.step or roundoff ** (1 / 3) * (1 + torch.linalg.vector_norm(theta))

        def column(v: Tensor) -> Tensor:
            # Scaled by the largest entry first, so that no square under- or overflows; clamped
            # rather than tested for zero, which would make the host wait for the device.
            tiny = torch.finfo(v.dtype).tiny
            largest = torch.linalg.vector_norm(v, torch.inf).clamp_min(tiny)
            scaled = v / largest
            length = torch.linalg.vector_norm(scaled).clamp_min(tiny)
            unit = scaled / length
            plus, minus = theta + step * unit, theta - step * unit
            moved = torch.dot(plus - minus, unit).clamp_min(tiny)
            difference = gradient_of(f, plus) - gradient_of(f, minus)
            return difference.mul_(length / moved * largest)

        def product(V: Tensor, *, last: bool = False) -> Tensor:
            return torch.stack([column(v) for v in V.unbind(1)], dim=1)

        return product
