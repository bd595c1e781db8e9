"""K = ⊕_b (Q_L ⊗ Q_R) diag(λ) (Q_L ⊗ Q_R)ᵀ, applied as X ↦ Q_L (λ ∘ (Q_Lᵀ X Q_R)) Q_Rᵀ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from torchlinop.choices import refuse_unknown
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.damping import finite_number, inverted
from torchlinop.operators.eigenbasis import Eigenbasis, common_eigenbasis, diagonal_in
from torchlinop.parameters import ParameterLayout
from torchlinop.space import VectorSpace
from torchlinop.tensor_file import intact, layout_as_json, layout_from_json, read, write

Split = Literal["exact", "pi"]

_FORMAT = 1  # of saved operators


@dataclass(frozen=True)
class KroneckerBlock:
    """A symmetric matrix, by its eigenvectors, on m = r c entries seen as X (r, c), row-major.

    None in place of eigenvectors is the identity. A dense matrix has c = 1.
    """

    entries: slice | Tensor  # of the flat vector: a range, or indices (m,)
    left: Tensor | None  # (r, r), eigenvectors as columns
    right: Tensor | None  # (c, c)
    eigenvalues: Tensor  # (r, c)
    factors: tuple[Tensor, Tensor] | None = None  # (r,) and (c,), whose outer product they are

    def matmat(self, V: Tensor) -> Tensor:
        """The product with a block (m, k). Costs k (r + c) m multiplications, twice."""
        r, c = self.eigenvalues.shape
        X = V.mT.reshape(-1, r, c)
        X = X if self.left is None else self.left.mT @ X
        X = X if self.right is None else X @ self.right
        X = self.eigenvalues * X
        X = X if self.left is None else self.left @ X
        X = X if self.right is None else X @ self.right.mT
        return X.reshape(len(X), -1).mT

    @property
    def is_product(self) -> bool:
        """Whether it is one Kronecker product of two factors, none of them a number."""
        return self.factors is not None and 1 not in self.eigenvalues.shape

    def with_eigenvalues(self, eigenvalues: Tensor) -> KroneckerBlock:
        """Another matrix with the same eigenvectors."""
        return replace(self, eigenvalues=eigenvalues, factors=None)

    def inverse(self, damping: float, split: Split) -> KroneckerBlock:
        """``(K + d I)⁻¹``; split in two factors where there are two, if so asked."""
        # Rounding may leave an eigenvalue below zero, of which the inverse has a wrong sign.
        damped = self._damped(damping, split).clamp_min(0)
        return self.with_eigenvalues(inverted(damped, damping, self.eigenvalues.dtype))

    def _damped(self, damping: float, split: Split) -> Tensor:
        """The eigenvalues (r, c) that are inverted, in float64."""
        if split == "pi" and self.is_product and self.factors is not None:
            left, right = (factor.double() for factor in self.factors)
            if left.mean() > 0 and right.mean() > 0:
                pi = (left.mean() / right.mean()).sqrt()
                return torch.outer(left + pi * damping**0.5, right + damping**0.5 / pi)
        return self.eigenvalues.double() + damping


def diagonal_block(entries: slice | Tensor, diagonal: Tensor) -> KroneckerBlock:
    """The diagonal matrix of m entries (m,)."""
    return KroneckerBlock(entries, None, None, diagonal[:, None])


Pairs = Sequence[tuple[Tensor, Tensor]]


def common_bases(pairs: Pairs) -> tuple[Eigenbasis, Eigenbasis]:
    """One eigenbasis for all left factors, and one for all right ones.

    Factors are (r, r) and (c, c), or (r,) and (c,) where they are diagonal.
    """
    return common_eigenbasis([L for L, _ in pairs]), common_eigenbasis([R for _, R in pairs])


def kronecker_sum(
    entries: slice | Tensor,
    pairs: Pairs,
    bases: tuple[Eigenbasis, Eigenbasis],
    dtype: torch.dtype,
) -> KroneckerBlock:
    """``Σ_u L_u ⊗ R_u``, all positive semidefinite, projected on the basis Q_L ⊗ Q_R.

    λ is the diagonal of the sum in this basis, so that the trace is kept. Exact for the common
    bases of one pair, and of pairs whose factors commute.
    """
    left, right = bases
    diagonals = [(diagonal_in(left, L), diagonal_in(right, R)) for L, R in pairs]
    eigenvalues = torch.stack([torch.outer(*pair) for pair in diagonals]).sum(0)
    factors = (diagonals[0][0].to(dtype), diagonals[0][1].to(dtype))
    return KroneckerBlock(
        entries,
        None if left.vectors is None else left.vectors.to(dtype),
        None if right.vectors is None else right.vectors.to(dtype),
        eigenvalues.to(dtype),
        factors if len(pairs) == 1 else None,
    )


class KroneckerOperator(CurvatureOperator):
    """A positive semidefinite block-diagonal matrix, every block by its eigendecomposition.

    The blocks share out all entries of the flat vector. Functions of the matrix cost what one
    pass over its eigenvalues costs. A block of two factors is never dense; one that has no
    factors, of a normalisation say, has c = 1 and dense eigenvectors (m, m), unless diagonal.
    """

    def __init__(
        self,
        space: VectorSpace,
        blocks: Sequence[KroneckerBlock],
        *,
        layout: ParameterLayout | None = None,
        description: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(
            space, layout=layout, description=description, notes=notes, positive_semidefinite=True
        )
        self.kronecker_blocks = tuple(blocks)

    def _matmat(self, V: Tensor) -> Tensor:
        KV = torch.empty_like(V)
        for block in self.kronecker_blocks:
            KV[block.entries] = block.matmat(V[block.entries])
        return KV

    def trace(self) -> Tensor:
        """``tr K``: a float64 scalar."""
        return self._total(torch.sum)

    def logdet(self) -> Tensor:
        """``log det K``: a float64 scalar, minus infinity for a singular matrix."""
        return self._total(lambda eigenvalues: eigenvalues.log().sum())

    def det(self) -> Tensor:
        """``det K``: a float64 scalar, which easily under- or overflows; see ``logdet``."""
        return self.logdet().exp()

    def frobenius_norm(self) -> Tensor:
        """``‖K‖_F``: a float64 scalar."""
        return self._total(lambda eigenvalues: eigenvalues.square().sum()).sqrt()

    def _total(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([of(b.eigenvalues.double()) for b in self.kronecker_blocks]).sum()

    def inverse(self, damping: float, *, split: Split = "exact") -> KroneckerOperator:
        """``(K + d I)⁻¹`` exactly, or with d split between the two factors of every block.

        ``split="pi"`` inverts ``(L + π √d I) ⊗ (R + √d/π I)`` with π² the ratio of the factors'
        mean eigenvalues (Martens and Grosse, Optimizing neural networks with
        Kronecker-factored approximate curvature, 2015, section 6.3). Blocks that are not one
        Kronecker product of two factors (of biases, normalisations, tied weights) are inverted
        exactly.

        Raises:
            OptionError: unknown split, one the matrix has no factors for, no number ≥ 0, or no
                inverse that is finite in the operator's dtype.
        """
        damping = finite_number("damping", damping)
        self._refuse_bad_damping(damping, split)
        return KroneckerOperator(
            self.space,
            [block.inverse(damping, split) for block in self.kronecker_blocks],
            layout=self.layout,
            description=[
                f'inverse of {type(self).__name__} + {damping:g} I, split="{split}"',
                *self.description,
            ],
            notes=self.notes,
        )

    def _refuse_bad_damping(self, damping: float, split: str) -> None:
        refuse_unknown("split", split, get_args(Split))
        if split == "pi" and not any(b.is_product for b in self.kronecker_blocks):
            raise OptionError(
                'split="pi" divides the damping between two Kronecker factors, which '
                f'{type(self).__name__} does not have; pass split="exact"'
            )
        if damping < 0:
            raise OptionError(
                f"expected damping to be at least 0, got {damping:g}; pass damping=1e-3, say"
            )

    def save(self, path: str | Path) -> None:
        """Write the eigendecompositions to a safetensors file, with one JSON header.

        Raises:
            OptionError: the package safetensors is not installed, or the path cannot be written.
        """
        header = {
            "format": _FORMAT,
            "operator": type(self).__name__,
            "size": self.size,
            "layout": layout_as_json(self.layout),
            "description": self.description,
            "notes": self.notes,
            "blocks": [_range(block.entries) for block in self.kronecker_blocks],
        }
        tensors = {
            f"{b}.{part}": tensor
            for b, block in enumerate(self.kronecker_blocks)
            for part, tensor in _tensors(block).items()
        }
        write(path, tensors, header)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> KroneckerOperator:
        """The operator that was saved: the same matrix to rounding, without its model and data.

        It is a ``KroneckerOperator``, whatever was saved, and has no ``coverage``.

        Raises:
            OptionError: the package safetensors is not installed, the file is not one of ours,
                or the device is none of this machine.
        """
        tensors, header = read(path, device)
        if "operator" not in header or header.get("format") != _FORMAT:
            raise OptionError(
                f"expected an operator of format {_FORMAT} in {path}, got "
                f"{header.get('operator', 'something else')} of format {header.get('format')}; "
                "load it with the class and the version that saved it"
            )
        with intact(path):
            blocks = [
                _block(written, tensors, f"{b}.") for b, written in enumerate(header["blocks"])
            ]
            first = blocks[0].eigenvalues
            return KroneckerOperator(
                VectorSpace(header["size"], first.dtype, first.device),
                blocks,
                layout=layout_from_json(header["layout"]),
                description=[f"saved {header['operator']}", *header["description"]],
                notes=header["notes"],
            )


def _range(entries: slice | Tensor) -> list[int] | None:
    return [entries.start, entries.stop] if isinstance(entries, slice) else None


def _tensors(block: KroneckerBlock) -> dict[str, Tensor]:
    left, right = block.factors or (None, None)
    parts = {
        "entries": None if isinstance(block.entries, slice) else block.entries,
        "left": block.left,
        "right": block.right,
        "eigenvalues": block.eigenvalues,
        "left_factor": left,
        "right_factor": right,
    }
    return {name: part for name, part in parts.items() if part is not None}


def _block(written: list[int] | None, tensors: dict[str, Tensor], prefix: str) -> KroneckerBlock:
    parts = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return KroneckerBlock(
        slice(*written) if written else parts["entries"],
        parts.get("left"),
        parts.get("right"),
        parts["eigenvalues"],
        (parts["left_factor"], parts["right_factor"]) if "left_factor" in parts else None,
    )
