"""Which earlier vectors a Lanczos vector is made orthogonal to: all, all at times, few, none."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchlinop.algorithms.basis import Basis
from torchlinop.algorithms.orthogonal import extended, factored
from torchlinop.choices import refuse_unknown

Array = NDArray[np.float64]
Reorthogonalization = bool | str  # True is "full", False is "none"

_WINDOW = 5  # vectors, as users of local reorthogonalisation choose


class Policy(Protocol):
    """Makes w, after the three-term recurrence, orthogonal to columns of V and a unit vector."""

    def __call__(
        self, w: Tensor, V: Basis, alpha: Tensor, beta: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Its length (), and that of what was taken or dropped, of which T knows nothing.

        In place, on the device. If w is no longer than ``threshold``, it becomes zero, and so does
        its length. ``alpha`` (j + 1,) and ``beta`` (j,) are known, and so are j + 1 columns of V;
        w is the memory of the next, if V has any.
        """


class Last:
    """To the last few, or to all: once, as the recurrence was the first of two passes.

    "Twice is enough". After the last few alone, copies of converged eigenvalues ("ghosts") still
    appear.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window

    def __call__(
        self, w: Tensor, V: Basis, alpha: Tensor, beta: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = len(alpha)
        start = 0 if self.window is None else max(0, size - self.window)
        c, s, lost = extended(V.space, V.columns(start, size + 1), threshold)
        return s[0, 0].real, _length(c) + lost[0]


class Nothing:
    """To none but by the recurrence. Copies of converged eigenvalues appear."""

    def __call__(
        self, w: Tensor, V: Basis, alpha: Tensor, beta: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _unit(w, V, threshold)


class Partial:
    """To all, when an estimate of the inner products exceeds the root of the roundoff.

    Simon, The Lanczos algorithm with partial reorthogonalization, Math. Comp. 42 (1984). The
    estimates follow the recurrence of the vectors. Two consecutive vectors are treated, as the
    next depends on both. The decision is the host's: one synchronisation a step.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self._before, self._now = np.zeros(0), np.ones(1)  # ω of v_{j-1} and v_j with v_0, v_1, ...
        self._again = False

    def __call__(
        self, w: Tensor, V: Basis, alpha: Tensor, beta: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        taken = torch.zeros_like(alpha[0])
        norm = float(V.space.norm(w)[0])
        omega = self._next(alpha.cpu().numpy(), beta.cpu().numpy(), norm)
        if self._again or np.abs(omega[:-1]).max() > self.eps**0.5:
            H = V.project(w, len(alpha))
            if float(_length(H)) > self.eps**0.5 * norm:  # times what V lacks of orthonormal: left
                H += V.project(w, len(alpha))
            taken = _length(H)
            omega[:-1] = self.eps
            self._again = not self._again
        self._before, self._now = self._now, omega
        length, lost = _unit(w, V, threshold)
        return length, taken + lost

    def _next(self, alpha: Array, beta: Array, norm: float) -> Array:
        """ω of v_{j+1} with v_0, ..., v_{j+1}: Simon's recurrence, its noise at the worst."""
        j = len(beta)
        now, before = self._now, np.append(self._before, 0.0)
        omega = np.append(np.full(j + 1, self.eps), 1.0)
        if j == 0 or norm == 0:
            return omega
        scale = np.abs(alpha).max() + 2 * beta.max()
        sums = beta * now[1:] + (alpha[:j] - alpha[j]) * now[:j] - beta[-1] * before[:j]
        sums[1:] += beta[:-1] * now[: j - 1]
        omega[:j] = (sums + np.copysign(2 * self.eps * scale, sums)) / norm
        omega[j] = self.eps * max(1.0, scale / norm)
        return omega


def _unit(w: Tensor, V: Basis, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Divide w by its length, in place; the length, and what was lost if it is too small."""
    length, lost = factored(V.space, w, threshold)
    return length[0, 0].real, lost[0]


def _length(H: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(H)
    return length


_BY_NAME: dict[str, Policy] = {"full": Last(), "local": Last(_WINDOW), "none": Nothing()}
NAMES = ("full", "partial", "local", "none")


def name_of(reorthogonalize: Reorthogonalization) -> str:
    """The mode's name.

    Raises:
        OptionError: there is no such mode.
    """
    name = reorthogonalize
    if isinstance(name, bool):
        name = "full" if name else "none"
    refuse_unknown("reorthogonalize", name, NAMES)
    return name


def policy_of(name: str, dtype: torch.dtype) -> Policy:
    """The mode of this name, for one run."""
    return Partial(torch.finfo(dtype).eps) if name == "partial" else _BY_NAME[name]
