"""A V = V T + Q S: a Krylov space, expanded by blocks and contracted to Ritz vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from torchlinop.algorithms.basis import Basis, small_dtype
from torchlinop.algorithms.orthogonal import IN_SPAN, complete, extended, factored, removed
from torchlinop.algorithms.products import Products, breakdown, multiply, roundoff
from torchlinop.algorithms.ritz import Ritz, Which, order_of
from torchlinop.algorithms.same_matrix import refuse_another_matrix
from torchlinop.algorithms.scaled_product import scaled_product
from torchlinop.algorithms.symmetry_watch import SymmetryWatch

Loss = Literal["none", "some", "all"]  # of the columns of a block, to their breakdown

# What the residuals of kept vectors gain at a restart: by the rounding of V Y, in roundoffs of ‖A‖,
# and by that of Y, up to three times what is seen in T Y (both measured, in 1 to 1600 restarts).
_ROTATION = 0.5
_EIGH = 3.0
# Half precision rounds vectors by a quarter of its ε. What that does to products is seen in T, and
# in S, by as many numbers as V has columns: with two, a claim may be five times too small.
_FEW = 12.0


class KrylovDecomposition:
    """``A V = V T + Q S`` with orthonormal [V, Q]; V has ``size`` columns, Q ``width``.

    Stewart, A Krylov-Schur algorithm for large eigenproblems, SIMAX 23 (2002); for symmetric
    matrices this is thick-restart Lanczos (Wu and Simon, SIMAX 22, 2000), in blocks (Zhou and
    Saad, Numerical Algorithms 47, 2008).
    """

    def __init__(
        self, products: Products, basis: Basis, start: Tensor, capacity: int, seed: int
    ) -> None:
        self.block_size = start.shape[1]
        dtype, stored = products.operator.dtype, torch.finfo(basis.rows.dtype).eps
        self.products, self.basis, self.seed = products, basis, seed
        self.capacity = capacity
        self.eps, self.breakdown = roundoff(dtype), breakdown(dtype)
        self._unseen = _FEW if self.eps > torch.finfo(start.dtype).eps else 0.0
        self.watch = SymmetryWatch(products, seed, stored)
        self.T = torch.zeros(
            (self._rows(), self._rows()), dtype=small_dtype(start.dtype), device=start.device
        )
        self.scale = torch.zeros((), dtype=torch.float64, device=start.device)  # below ‖A‖
        self.scaled = False  # whether it is known not to be zero
        self.errors = torch.zeros(self._rows(), dtype=torch.float64, device=start.device)
        self.kept = self.draws = 0
        self._nothing = start[:, :0]
        self._continue(0, self._nothing, start)

    def _rows(self) -> int:
        return self.capacity + self.block_size

    @property
    def width(self) -> int:
        return self.block.shape[1]

    def _continue(self, size: int, previous: Tensor, Q: Tensor) -> None:
        # One statement, so that an interruption finds all of it, or nothing.
        self.size, self.previous, self.block = size, previous, self.basis.put(size, Q)

    def expand(self) -> None:
        """Take the product of Q, and make it orthogonal to V and Q. Nothing leaves the device.

        First to the neighbours, where the product has all its components but rounding; then to
        all. So the basis is read twice, not four times, and still "twice is enough" (Parlett
        1980, section 6.9). After a restart the neighbours are all.
        """
        T, start, stop = self.T, self.size, self.size + self.width
        new, after = slice(start, stop), slice(stop, stop + self.width)
        W = self.basis.room(stop, self.width)
        s = scaled_product(self.products, self.block, self.scale if self.scaled else None, W)
        H = self._neighbours(W)
        self.scale = torch.maximum(self.scale, s * torch.linalg.matrix_norm(H))
        C, S, lost = self._projected(W, self.breakdown * self.scale / s)
        T[:stop, new], T[after, new] = s * (H + C), s * S
        self.errors[new] = s * torch.linalg.vector_norm(lost)
        self.scale = torch.maximum(self.scale, s * torch.linalg.matrix_norm(S))
        self._continue(stop, self.block, W)

    def _projected(self, W: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``W = V C + Q S``, where Q replaces W, and the lengths (w,) of columns that were lost."""
        V, space, stop = self.basis, self.basis.space, self.size + self.width
        if V.direct and self.width == 1:
            return extended(space, V.columns(0, stop + 1), threshold)
        R, lost = factored(space, W, threshold)
        C = V.project(W, stop) @ R
        S, in_span = factored(space, W, IN_SPAN)
        return C, S @ R, lost + in_span * R.diagonal().real

    def _neighbours(self, W: Tensor) -> Tensor:
        """``W -= V H`` for the columns next to the block, and itself; H (stop, w)."""
        start, stop, space = self.size, self.size + self.width, self.basis.space
        after_restart = start == self.kept
        first = 0 if after_restart else start - self.previous.shape[1]
        if self.basis.direct:
            near = self.basis.project(W, stop, first)
        else:  # what is stored is not as accurate as the neighbours are
            before = (
                self.basis.project(W, start) if after_restart else removed(space, self.previous, W)
            )
            near = torch.cat([before, removed(space, self.block, W)])
        return torch.cat([near.new_zeros(first, near.shape[1]), near])

    def observe(self, which: Which, checked: int) -> tuple[Ritz, Loss]:
        """Rayleigh-Ritz on V, and how much of a block after ``checked`` was lost.

        Columns lost are replaced by random ones, and what came after that block is forgotten.
        The one transfer from the device; a second one where columns were lost.

        Raises:
            NonFiniteError, SymmetryError: the products are not those of a symmetric matrix.
        """
        T, errors = self._transferred()
        self.watch.defect(T[: self.size])
        loss: Loss = "none"
        lost = self._first_loss(T, checked)
        if lost is not None:
            loss = self._mend(T, *lost)
            T, errors = self._transferred()
        return self._ritz(T, errors, which), loss

    def _ritz(self, T: Tensor, errors: Tensor, which: Which) -> Ritz:
        j = self.size
        values, vectors = torch.linalg.eigh((T[:j] + T[:j].mH) / 2)
        order = order_of(values, which)
        theta, Y = values[order], vectors[:, order]
        coupling, norm = T[j:] @ Y, float(values.abs().max())
        self.scaled = norm > 0
        floor = (2 + self._unseen / max(j, 1)) * self.eps * norm
        # Errors of different columns, and those in T, are independent: squares are added.
        inherited = (errors**2) @ Y.abs() ** 2
        if self.basis.direct:  # else T has the rounding of what is stored, which a clean-up removes
            defects = torch.linalg.vector_norm(T[:j] @ Y - Y * theta, dim=0)
            inherited += (_EIGH * defects) ** 2
        noise = (inherited + floor**2).sqrt()
        residuals = torch.hypot(noise, torch.linalg.vector_norm(coupling, dim=0))
        return Ritz(theta, Y, residuals, coupling, norm, floor, noise)

    def _transferred(self) -> tuple[Tensor, Tensor]:
        """T (j + w, j), and the errors of its columns (j,): lengths that were dropped, noise."""
        j = self.size
        both = torch.cat([self.T[: j + self.width, :j], self.errors[None, :j]]).to("cpu")
        return both[:-1], both[-1].real.contiguous()

    def _first_loss(self, T: Tensor, checked: int) -> tuple[int, int] | None:
        """The columns (start, stop) of V of which the next block is the first with a loss."""
        width = self.width
        lost = T.diagonal(-width).real == 0 if width else torch.zeros(0)
        for start in range(checked, self.size, width):
            if bool(lost[start : start + width].any()):
                return start, start + width
        return None

    def _mend(self, T: Tensor, start: int, stop: int) -> Loss:
        width, room = stop - start, self.basis.space.size - stop
        rows = torch.arange(stop, stop + width)
        alive = rows[T[rows, rows - width].real > 0][:room]
        Q = torch.cat([self.basis.columns(i, i + 1) for i in alive.tolist()] or [self._nothing], 1)
        self.T[:, stop:] = 0
        self.T[stop:] = 0
        self.T[stop : stop + len(alive), :stop] = T[alive, :stop].to(self.T)
        self.draws += 1
        missing = min(self.block_size, room) - len(alive)
        Q = complete(self.basis, stop, Q, missing, seed=self.seed, draw=self.draws)
        self._continue(stop, self.basis.columns(start, stop), Q)
        return "some" if len(alive) else "all"

    def restart(self, ritz: Ritz, keep: int) -> None:
        """``V ← V Y`` for the first ``keep`` Ritz vectors; T becomes diagonal but for S."""
        width = self.width
        Y = ritz.vectors[:, :keep]
        block = self.block.mT.clone().mT  # the buffer is about to be overwritten
        self.basis.rotate(Y)
        self.T.zero_()
        self.T[:keep, :keep] = torch.diag(ritz.values[:keep]).to(self.T)
        self.T[keep : keep + width, :keep] = ritz.coupling[:, :keep].to(self.T)
        inherited = (ritz.least(keep) ** 2 - ritz.floor**2).clamp_min(0)
        self.errors[:keep] = (inherited + (_ROTATION * self.eps * ritz.norm) ** 2).sqrt()
        self.kept = keep
        self._continue(keep, self._nothing, block)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that determines what comes next, but for the matrix: tensors, and numbers."""
        j, V = self.size, self.basis
        tensors = {
            "rows": V.rows[: j + self.width],
            "T": self.T[: j + self.width, :j],
            "errors": self.errors[:j],
        }
        if not V.direct:  # the rows have fewer digits, or are elsewhere
            tensors |= {"previous": self.previous.mT, "block": self.block.mT}
        numbers = {
            "size": j,
            "previous": self.previous.shape[1],
            "kept": self.kept,
            "draws": self.draws,
            "scale": float(self.scale),
            "scaled": self.scaled,
            "symmetric": self.watch.symmetric,
        }
        return tensors, numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Be as when ``state`` was called.

        Takes a product, which is not counted, to see whether the matrix is still the same; where it
        seems not, six more tell that from noise.

        Raises:
            OptionError: it is another one.
        """
        V, j, rows = self.basis, numbers["size"], tensors["rows"]
        V.rows[: len(rows)].copy_(rows)
        self.T.zero_()[: len(rows), :j] = tensors["T"].to(self.T)
        self.errors[:j] = tensors["errors"].to(self.errors)
        self.size, self.kept, self.draws = j, numbers["kept"], numbers["draws"]
        self.scaled, self.watch.symmetric = numbers["scaled"], numbers["symmetric"]
        self.scale.fill_(numbers["scale"])
        if V.direct:
            self.previous = V.columns(j - numbers["previous"], j)
            self.block = V.columns(j, len(rows))
        else:
            both = (tensors[name].to(V.device, copy=True).mT for name in ("previous", "block"))
            self.previous, self.block = both
        self._refuse_another_matrix()

    def _refuse_another_matrix(self) -> None:
        """Look whether ``A V y = V T y + Q S y`` for y of equal entries, to rounding."""
        V, j = self.basis, self.size
        y = torch.full((j, 1), max(j, 1) ** -0.5, dtype=self.T.dtype, device=V.device)
        norm = float(self.scale) or 1.0
        W = multiply(self.products.operator, V.combine(y)) / norm
        W -= V.combine(self.T[: j + self.width, :j] @ y / norm)
        difference = float(V.space.norm(W)[0])
        inherited = float(torch.linalg.vector_norm(self.errors[:j])) / norm
        rounding = max(self.breakdown, torch.finfo(V.rows.dtype).eps) + inherited
        refuse_another_matrix(self.products, difference, rounding)
