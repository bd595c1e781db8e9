"""One trial of an operator: random unit vectors of a seed, and what is said when it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from torchlinop.operators.base import CurvatureOperator
from torchlinop.testing.subjects import as_operator

_ROUNDOFFS = 1000


@dataclass(frozen=True)
class Trial:
    """An operator under test, as `as_operator` takes it with these options, and a seed."""

    op: CurvatureOperator
    seed: int
    how: dict[str, Any]

    @classmethod
    def of(cls, A: Any, seed: int, how: dict[str, Any]) -> Trial:
        """Of whatever multiplies vectors."""
        return cls(as_operator(A, **how), seed, how)

    def unit(self, columns: int) -> Tensor:
        """Random unit columns (n, columns)."""
        V: Tensor = self.op.space.random(columns, self.seed)
        V /= torch.linalg.vector_norm(V, dim=0)
        return V

    def unit_line(self, columns: int) -> str:
        """The Python that makes ``V = unit(columns)``."""
        return f"V = A.space.random({columns}, {self.seed}); V /= V.norm(dim=0)"

    def bound(self, rtol: float | None) -> float:
        """``rtol``, or a thousand roundoffs of the dtype."""
        return _ROUNDOFFS * torch.finfo(self.op.dtype).eps if rtol is None else rtol

    def hold(
        self, what: str, defects: Tensor, scales: Tensor, bound: float, lines: Sequence[str]
    ) -> None:
        """Fail where a defect is not within ``bound`` of its scale; both are (k,).

        ``{i}`` in the lines becomes the number of the worst.
        """
        # Below the least normal number errors are no longer relative to what they are errors of.
        floor = self.op.size * torch.finfo(self.op.dtype).tiny
        # ``not (≤)`` so that NaN comes to light.
        bad = ~(defects <= bound * scales + floor)
        if bad.any():
            relative = (defects / scales).nan_to_num(torch.inf).where(bad, 0)
            i = int(relative.argmax())
            self.fail(
                f"{what} {float(defects[i]):.3g}, {float(defects[i] / scales[i]):.1e} of the "
                f"products, where rtol={bound:.1e} is allowed",
                [line.replace("{i}", str(i)) for line in lines],
            )

    def fail(self, sentence: str, lines: Sequence[str], *, other: Trial | None = None) -> NoReturn:
        """An AssertionError with the operator (and B, if there is another), seed, and Python."""
        subjects = {"A": self} | ({"B": other} if other else {})
        code = [
            "import torch",
            "from torchlinop.testing import as_operator",
            *(f"{name} = as_operator({name}{_written(one.how)})" for name, one in subjects.items()),
            *lines,
        ]
        raise AssertionError(
            "\n".join(
                [
                    f"{sentence}.",
                    *(f"{name} = {one.op!r}, seed={self.seed}" for name, one in subjects.items()),
                    "Reproduce:",
                    *(f"    {line}" for line in code),
                ]
            )
        )


def _written(options: dict[str, Any]) -> str:
    """As arguments of a call."""
    as_text = {
        name: value if isinstance(value, int | torch.dtype) else np.dtype(value).name
        for name, value in options.items()
    }
    return "".join(f", {name}={value!r}" for name, value in as_text.items())


def sizes(X: Tensor) -> Tensor:
    """The norm of every column (n, k), in double precision and without overflow or underflow."""
    X = X.abs().double()
    largest = X.amax(0)
    scale = torch.where(largest > 0, largest, 1)
    # Infinity stays what it is: inf / inf is NaN, which no bound holds.
    norms: Tensor = scale * torch.linalg.vector_norm(X / scale, dim=0)
    return norms.cpu()
