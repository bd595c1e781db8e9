"""Ways to differentiate a function of θ: maps V ↦ H V, V ↦ J V and U ↦ Jᵀ U of one point."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchlinop.checkpointing import noticed_packing
from torchlinop.formulas import WithoutWrongForwardRules

Function = Callable[[Tensor], Tensor]  # of a flat vector (n,)

# What torch says of operations that forward mode, or a batch of it, cannot pass through.
_NO_RULE = re.compile(
    "NotImplementedError|forward.?(mode )?AD|ZeroTensors|vmap|functorch|torch.func"
    "|Cannot access data pointer"  # packed sequences ask for memory, which a tangent has not
)

log = logging.getLogger("torchlinop")


class LinearMap(Protocol):
    """``V ↦ A V`` for blocks (n, k), all columns in one pass; ``last`` lets it free its memory."""

    def __call__(self, V: Tensor, *, last: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Linearized:
    """``f(θ + v) ≈ f(θ) + J v``: m outputs of any shape, and J (m, n) by its products."""

    outputs: Tensor  # f(θ), detached
    push: LinearMap  # V (n, k) -> J V (m, k)
    pull: LinearMap  # U (m, k) -> Jᵀ U (n, k)


class Derivative(Protocol):
    """A way to differentiate functions of a flat vector (n,): scalars twice, others once."""

    @property
    def shares_work(self) -> bool:
        """Whether the maps hold work done at theta, worth keeping between products."""
        ...

    @property
    def exact(self) -> bool:
        """Whether all derivatives are taken by autograd."""
        ...

    def hvp(self, f: Function, theta: Tensor) -> LinearMap:
        """The Hessian of the scalar ``f`` at ``theta`` as a map of blocks."""
        ...

    def linearize(self, f: Function, theta: Tensor) -> Linearized:
        """The outputs of ``f`` at ``theta``, and its Jacobian as maps of blocks."""
        ...


def gradient_of(f: Function, theta: Tensor, *, create_graph: bool = False) -> Tensor:
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
    """Exact: reverse mode through the graph of a reverse pass, which is built once.

    A Hessian product goes through the graph of the gradient. Jᵀ U goes through the graph of f,
    and J V through the graph of ``u ↦ Jᵀ u``, which is linear, so that its transpose is J.
    Costs about one gradient to build; H V about two a column, J V and Jᵀ U two thirds of one
    each; memory of two activation graphs.
    """

    shares_work = True
    exact = True

    def hvp(self, f: Function, theta: Tensor) -> LinearMap:
        theta = theta.detach().requires_grad_()
        return _transposed_jacobian(gradient_of(f, theta, create_graph=True), theta)

    def linearize(self, f: Function, theta: Tensor) -> Linearized:
        theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            outputs = f(theta)
            # Jᵀ is linear in u, so its value does not matter: one zero, expanded, takes no memory.
            u = outputs.new_zeros(()).expand(outputs.shape).requires_grad_()
            pulled = torch.zeros_like(theta)
            if outputs.requires_grad:
                (pulled,) = torch.autograd.grad(outputs, theta, u, create_graph=True)
        push, pull = _transposed_jacobian(pulled, u), _transposed_jacobian(outputs, theta)
        return Linearized(outputs.detach(), push, pull)


def _transposed_jacobian(outputs: Tensor, inputs: Tensor) -> LinearMap:
    """``V (m, k) ↦ (∂ outputs / ∂ inputs)ᵀ V`` (n, k), through the graph of the outputs."""
    shape, dtype = outputs.shape, outputs.dtype
    # The graph is held by its edge: the outputs themselves would be memory for nothing.
    edge = get_gradient_edge(outputs) if outputs.requires_grad else None

    def product(V: Tensor, *, last: bool = False) -> Tensor:
        k = V.shape[1]
        rows = V.mT.to(dtype)
        if edge is None:  # the outputs do not depend on the inputs
            return rows.new_zeros(k, inputs.numel()).mT
        (U,) = torch.autograd.grad(
            edge,
            inputs,
            rows.reshape(k, *shape) if k > 1 else rows.reshape(shape),
            retain_graph=not last,
            is_grads_batched=k > 1,
            materialize_grads=True,
        )
        return U.reshape(k, -1).mT

    return product


@dataclass
class ForwardOverReverse:
    """Exact: forward mode; little is kept, so memory stays at two gradients.

    A Hessian product, forward mode through the gradient, costs about four gradients a column;
    J V, forward mode through f, costs one. Where an operation has no forward rule in torch, or a
    wrong one, all further products are taken by ``fallback``, and the log says so once.
    """

    fallback: Derivative = ReverseOverReverse()
    _without_rule: bool = field(default=False, init=False, repr=False)
    shares_work = False
    exact = True

    def hvp(self, f: Function, theta: Tensor) -> LinearMap:
        theta = theta.detach()
        return self._ladder(torch.func.grad(f), theta, lambda: self.fallback.hvp(f, theta))

    def linearize(self, f: Function, theta: Tensor) -> Linearized:
        theta = theta.detach()
        outputs, pull = _with_pull(f, theta)
        push = self._ladder(f, theta, lambda: self.fallback.linearize(f, theta).push)
        return Linearized(outputs, push, pull)

    def _ladder(self, f: Function, theta: Tensor, below: Callable[[], LinearMap]) -> LinearMap:
        """``V ↦ (∂f/∂θ) V`` by forward mode, or by the map that ``below`` builds."""
        fallback: list[LinearMap] = []

        def column(v: Tensor) -> Tensor:
            with without_deprecations(), WithoutWrongForwardRules():
                tangent: Tensor = torch.func.jvp(f, (theta,), (v,))[1]
            return tangent.detach().reshape(-1)

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
                    log.info("no forward-mode product, using %s: %s", self.fallback, error)
                    self._without_rule = True
            if not fallback:
                fallback.append(below())
            return fallback[0](V, last=last)

        return product


def _with_pull(f: Function, theta: Tensor) -> tuple[Tensor, LinearMap]:
    """f(θ), detached, and ``U ↦ Jᵀ U`` through its graph.

    Where saved tensors are packed away, f is evaluated again for Jᵀ: they would be computed from
    the parameters placed last, which J V may have moved.
    """
    theta = theta.detach().requires_grad_()

    def evaluated() -> Tensor:
        with torch.enable_grad():
            return f(theta)

    with noticed_packing() as packing:
        outputs = evaluated()
    if not packing:
        return outputs.detach(), _transposed_jacobian(outputs, theta)

    def pull(V: Tensor, *, last: bool = False) -> Tensor:
        return _transposed_jacobian(evaluated(), theta)(V, last=last)

    return outputs.detach(), pull


@contextmanager
def without_deprecations() -> Iterator[None]:
    """The first forward derivative of a process makes torch use what it deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        yield


@dataclass(frozen=True)
class FiniteDifference:
    """Central differences, of gradients or outputs: no second graph, an error of order u^(2/3).

    The step along a direction v has Euclidean length ``step``, by default u^(1/3) (1 + ‖θ‖)
    with u the unit roundoff, whatever the length of v; the quotient is taken over the
    difference θ₊ − θ₋ as it was rounded. H V costs two gradients a column, J V two forward
    passes; Jᵀ U is exact.
    """

    step: float | None = None
    shares_work = False
    exact = False

    def hvp(self, f: Function, theta: Tensor) -> LinearMap:
        return self._differences(lambda point: gradient_of(f, point), theta.detach())

    def linearize(self, f: Function, theta: Tensor) -> Linearized:
        theta = theta.detach()
        outputs, pull = _with_pull(f, theta)

        def values(point: Tensor) -> Tensor:
            with torch.no_grad():
                return f(point).reshape(-1)

        return Linearized(outputs, self._differences(values, theta), pull)

    def _differences(self, f: Function, theta: Tensor) -> LinearMap:
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
            return (f(plus) - f(minus)).mul_(length / moved * largest)

        def product(V: Tensor, *, last: bool = False) -> Tensor:
            return torch.stack([column(v) for v in V.unbind(1)], dim=1)

        return product
