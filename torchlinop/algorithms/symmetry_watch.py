"""max |H − H^H| of a projection H = V^H A V: rounding, noise, or an A that is not symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.algorithms.products import Products, roundoff, working_dtype

_CHECK_PRODUCTS = 6  # of operator.check()


class SymmetryWatch:
    """Looks at the projected matrices of one run; what is suspicious, operator.check() decides.

    Args:
        products: of the run.
        seed: of the check.
        storage: ε of the vectors that projected the matrix, if they are stored coarser.
    """

    def __init__(self, products: Products, seed: int, storage: float = 0.0) -> None:
        dtype = products.operator.dtype
        working = torch.finfo(working_dtype(dtype)).eps
        self.products, self.seed = products, seed
        # This far from its transpose, relative to ‖A‖, H is worth a closer look.
        self.suspicious = max(1000 * working, 20 * roundoff(dtype), 4 * storage)
        self.symmetric = False  # as far as measured, whatever the noise

    def defect(self, H: Tensor, norm: float = 0.0) -> float:
        """``max |H − H^H|`` of H (j, j) on the CPU; ``norm`` is what is known of ‖A‖ otherwise.

        Raises:
            NonFiniteError, SymmetryError: the products are not those of a symmetric matrix.
        """
        self.products.refuse_non_finite(H)
        defect = float((H - H.mH).abs().max())
        scale = max(norm, float(torch.linalg.matrix_norm(H, 2)))
        if defect > self.suspicious * scale and not self.symmetric:
            self.products.count(_CHECK_PRODUCTS, _CHECK_PRODUCTS)
            self.products.operator.check(seed=self.seed, strict=True)
            self.symmetric = True
        return defect
