"""A symmetric matrix known by its products, closed under linear combination and restriction."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from torchlinop.dtypes import name_of
from torchlinop.errors import NoParametersError, OptionError, VectorError
from torchlinop.operators.check import CheckReport, check
from torchlinop.operators.damping import finite_number
from torchlinop.operators.grouping import Grouping, grouped
from torchlinop.operators.product import dense, of_block, of_vector
from torchlinop.parameters import ParameterLayout, ParamFilter, Slot
from torchlinop.space import VectorSpace


class CurvatureOperator(ABC):
    """A symmetric (Hermitian, if complex) matrix A of shape (n, n), known by ``V ↦ A V``.

    A subclass writes ``_matmat``. Sums, differences, real multiples, shifts and restrictions of
    operators are operators.
    """

    def __init__(
        self,
        space: VectorSpace,
        *,
        layout: ParameterLayout | None = None,
        description: Sequence[str] = (),
        notes: Sequence[str] = (),
        positive_semidefinite: bool = False,
    ) -> None:
        if layout is not None and layout.size != space.size:
            raise VectorError(
                f"expected a layout of {space.size:,} entries, got one of {layout.size:,}; pass "
                "that of the operator the matrix comes from, or none"
            )
        self.space = space
        self.layout = layout  # the model's tensors in the flat vector, if it has any
        self.description = tuple(description)  # facts shown by repr
        self.notes = tuple(notes)  # further ones, a line each, shown by check
        # Whether A ≥ 0 by construction, but for rounding. False: it is not known.
        self.positive_semidefinite = positive_semidefinite

    @abstractmethod
    def _matmat(self, V: Tensor) -> Tensor:
        """A V for a block (n, k) of this space, as fresh memory in any dense layout."""

    @property
    def size(self) -> int:
        """n, the number of rows and columns."""
        return self.space.size

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size)

    @property
    def dtype(self) -> torch.dtype:
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        return self.space.device

    def matmat(self, V: Tensor) -> Tensor:
        """A V for a block (n, k): a new tensor (n, k), detached. Costs k products, in few passes.

        Raises:
            VectorError: V has another shape, dtype or device than a block of this space.
        """
        return of_block(self._matmat, self.space, self.space.local_size, V)

    def matvec(self, v: Tensor) -> Tensor:
        """A v for a vector (n,): a new tensor (n,), detached. Costs one product.

        Raises:
            VectorError: v has another shape, dtype or device than a vector of this space.
        """
        return of_vector(self._matmat, self.space, self.space.local_size, v)

    def __matmul__(self, other: Tensor) -> Tensor:
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def to_dense(self, chunk: int = 256) -> Tensor:
        """The matrix itself, (n, n). Costs n products, taken ``chunk`` columns at a time."""
        if chunk < 1:
            raise OptionError(f"expected chunk to be at least 1, got {chunk}; leave it out")
        return self.space.gather(dense(self.matmat, self.space, self.space.local_size, chunk))

    def restrict(self, selection: ParamFilter | Tensor) -> Restriction:
        """The block A[I, I] of the rows and columns selected. Each product costs one of A.

        ``selection`` is a filter of parameters, or a tensor (m,) of distinct indices. Building
        an operator with ``param_filter`` gives the same block of a Hessian for less.

        Raises:
            OptionError: the selection is neither; VectorError: an index is out of range, or
                twice; NoParametersError: nothing is selected, or there are no names to filter.
        """
        if isinstance(selection, Tensor):
            return Restriction(self, selection, None)
        if not callable(selection):
            raise OptionError(
                f"expected a filter of parameters, or a tensor of indices, got {selection!r}; "
                "pass match_names(...) for names, torch.tensor(...) for indices"
            )
        if self.layout is None:
            raise NoParametersError(
                f"{type(self).__name__} has no named parameters to filter; "
                "restrict it with a tensor of indices"
            )
        return _block(self, self.layout, self.layout.restrict(selection))

    def blocks(self, by: Grouping = "parameter") -> dict[str, Restriction]:
        """The blocks A[b, b] of parameters that belong together, in the order of the layout.

        ``by`` is ``"parameter"``, ``"module"`` (the part of a name before its last dot, else
        ``"(root)"``), or a function ``(name, slot) -> label``.

        Raises:
            NoParametersError: the operator has no layout; OptionError: unknown ``by``.
        """
        if self.layout is None:
            raise NoParametersError(
                f"{type(self).__name__} has no named parameters to group; "
                "restrict it with tensors of indices"
            )
        groups = grouped(self.layout, by)
        return {label: _block(self, self.layout, slots) for label, slots in groups.items()}

    def shift(self, sigma: float) -> CurvatureOperator:
        """A + σ I, for a real σ."""
        return LinearCombination([(1.0, self)], finite_number("sigma", sigma))

    def check(self, *, seed: int = 0, strict: bool = False) -> CheckReport:
        """Measure in six products whether this is a fixed symmetric linear map, and its noise.

        ``strict=True`` raises SymmetryError or NonFiniteError where it is not.
        """
        return check(self, seed=seed, strict=strict)

    def __add__(self, other: CurvatureOperator) -> CurvatureOperator:
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return LinearCombination([(1.0, self), (1.0, other)])

    def __sub__(self, other: CurvatureOperator) -> CurvatureOperator:
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return LinearCombination([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float) -> CurvatureOperator:
        if not isinstance(factor, numbers.Real):
            return NotImplemented
        return LinearCombination([(finite_number("factor", factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> CurvatureOperator:
        if not isinstance(divisor, numbers.Real):
            return NotImplemented
        return self * (1 / float(divisor))

    def __neg__(self) -> CurvatureOperator:
        return self * -1.0

    def __repr__(self) -> str:
        n = f"{self.size:,}"
        facts = [
            f"{type(self).__name__} {n}x{n} {name_of(self.dtype)} {self.device}",
            *self.description,
        ]
        return f"<{' | '.join(facts)}>"


class LinearCombination(CurvatureOperator):
    """``Σ a_i A_i + σ I`` with real coefficients. A product costs one of every A_i."""

    def __init__(
        self, terms: Sequence[tuple[float, CurvatureOperator]], sigma: float = 0.0
    ) -> None:
        first = terms[0][1]
        for _, operator in terms:
            if operator.space != first.space:
                raise VectorError(
                    f"expected operators on one space, got {first!r} and {operator!r}; "
                    "build both from the same parameters, dtype and device"
                )
        summands = [(a, type(operator).__name__) for a, operator in terms]
        summands += [(sigma, "I")] if sigma else []
        layout = first.layout if all(A.layout == first.layout for _, A in terms) else None
        super().__init__(
            first.space,
            layout=layout,
            description=[_written(summands)],
            positive_semidefinite=sigma >= 0
            and all(a >= 0 and A.positive_semidefinite for a, A in terms),
        )
        self.terms = tuple(terms)
        self.sigma = sigma

    def _matmat(self, V: Tensor) -> Tensor:
        total = self.sigma * V
        for coefficient, operator in self.terms:
            total.add_(operator.matmat(V), alpha=coefficient)
        return total


def _written(summands: Sequence[tuple[float, str]]) -> str:
    """``2 A - B + 3 I``."""
    written = ""
    for a, name in summands:
        sign = "-" if a < 0 else "+"
        written += f" {sign} {name}" if abs(a) == 1 else f" {sign} {abs(a):g} {name}"
    return written[1].strip("+") + written[3:]  # no sign before the first but a minus


class Restriction(CurvatureOperator):
    """``A[I, I]``: the rows and columns I of an operator. A product costs one of A."""

    def __init__(
        self, operator: CurvatureOperator, indices: Tensor, layout: ParameterLayout | None
    ) -> None:
        if not operator.space.whole:
            raise VectorError(
                f"expected an operator whose vectors are whole on every rank, got {operator!r}, "
                "which has shards of them; pass param_filter where it is built, instead of a "
                "restriction"
            )
        indices = indices.to(operator.device)
        if indices.dtype != torch.int64 or indices.ndim != 1 or not len(indices):
            raise VectorError(
                f"expected a non-empty int64 tensor of indices (m,), got {indices.dtype} of "
                f"shape {tuple(indices.shape)}; pass mask.nonzero()[:, 0] for a mask"
            )
        inside = (indices >= 0) & (indices < operator.size)
        if not inside.all() or len(indices.unique()) != len(indices):
            raise VectorError(
                f"expected distinct indices from 0 to {operator.size - 1}, got "
                f"{len(indices)} from {int(indices.min())} to {int(indices.max())} "
                f"({len(indices.unique())} distinct); pass each index once"
            )
        space = VectorSpace(len(indices), operator.dtype, operator.device)
        description = f"{len(indices):,} of {operator.size:,} rows of {type(operator).__name__}"
        super().__init__(
            space,
            layout=layout,
            description=[description],
            positive_semidefinite=operator.positive_semidefinite,
        )
        self.operator = operator
        self.indices = indices

    def _matmat(self, V: Tensor) -> Tensor:
        embedded = V.new_zeros(self.operator.size, V.shape[1]).index_copy_(0, self.indices, V)
        return self.operator.matmat(embedded).index_select(0, self.indices)


def _block(
    operator: CurvatureOperator, layout: ParameterLayout, slots: tuple[Slot, ...]
) -> Restriction:
    """The rows and columns of these slots."""
    indices = torch.cat([torch.arange(slot.offset, slot.stop) for slot in slots])
    return Restriction(operator, indices, layout.packed(slots))
