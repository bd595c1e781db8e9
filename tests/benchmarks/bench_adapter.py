"""What the SciPy adapter adds to a product, in microseconds a matvec.

python tests/benchmarks/bench_adapter.py
"""

import time

import numpy as np
import torch
from torch import Tensor

from torchlinop import CurvatureOperator, VectorSpace, as_linear_operator


class Copy(CurvatureOperator):
    """The identity, whose product costs one copy: all else is overhead."""

    def _matmat(self, V: Tensor) -> Tensor:
        return V.clone()


def microseconds(function, calls=2000, repetitions=9):
    """The fastest of some repetitions, per call."""
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def main():
    torch.set_num_threads(1)
    n = 50
    operator = Copy(VectorSpace(n, torch.float64, torch.device("cpu")))
    A, x = as_linear_operator(operator), np.ones(n)
    v = torch.from_numpy(x)
    copy, product, scipy = (
        microseconds(f) for f in (v.clone, lambda: operator.matvec(v), lambda: A.matvec(x))
    )
    print(f"n = {n}, float64, one thread, torch {torch.__version__}, NumPy {np.__version__}")
    print(f"the copy itself      {copy:6.1f}")
    print(f"operator.matvec      {product:6.1f}")
    print(f"A.matvec by SciPy    {scipy:6.1f}   (overhead {scipy - copy:.1f})")


if __name__ == "__main__":
    main()
