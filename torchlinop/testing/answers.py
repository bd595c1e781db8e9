"""What an answer about an operator has to satisfy: eigenpairs that are, error bars that hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from torchlinop.errors import OptionError
from torchlinop.testing.spectra import wanted
from torchlinop.testing.subjects import as_operator

_ONE_IN = 1e-6  # a right answer fails this seldom


def assert_eigenpairs(
    A: Any,
    eigenvalues: Any,
    eigenvectors: Any,
    *,
    rtol: float,
    exact: Any = None,
    which: str = "LA",
    **how: Any,
) -> None:
    """``‖A x − λ x‖ ≤ rtol ‖A‖``, orthonormal x, and with ``exact``, the ones wanted.

    Residuals are taken by products of A and in double precision. ‖A‖ is the largest |λ| known.
    ``exact`` (n,) is the whole spectrum: copies of one eigenvalue beyond its multiplicity
    ("ghosts") and eigenvalues left out are named, for ``which`` of LA, SA and LM; for LM by their
    magnitudes, as of λ and -λ either will do where one is beyond the last.
    """
    op = as_operator(A, **how)
    values = torch.as_tensor(eigenvalues).double().cpu().flatten()
    X = torch.as_tensor(eigenvectors).to(device=op.device)
    if X.shape != (op.size, len(values)):
        raise AssertionError(
            f"expected eigenvectors as columns ({op.size}, {len(values)}), got {tuple(X.shape)}"
        )
    wide = torch.complex128 if X.is_complex() else torch.float64
    X, AX = X.to("cpu", wide), op.matmat(X.to(op.dtype)).to("cpu", wide)
    exact = None if exact is None else torch.as_tensor(exact).double().cpu()
    if exact is not None and len(exact) < len(values):
        raise OptionError(
            f"expected all {op.size:,} exact eigenvalues, got {len(exact)} for {len(values)} "
            "pairs; pass the whole spectrum"
        )
    norm = float((values if exact is None else exact).abs().max())
    residuals = torch.linalg.vector_norm(AX - X * values, dim=0)
    _assert_below(
        residuals,
        rtol * norm,
        "‖A x − λ x‖",
        f"rtol ‖A‖ = {rtol * norm:.3g}",
        "r = A @ eigenvectors[:, {i}] - eigenvalues[{i}] * eigenvectors[:, {i}]; "
        "print((abs(r) ** 2).sum() ** 0.5)",
    )
    # In pieces, as one long sum of n squares rounds by up to n roundoffs.
    gram = torch.stack([x.mH @ x for x in X.split(4096)]).sum(0)
    gram = (gram - torch.eye(len(values))).abs()
    _assert_below(
        gram.amax(0),
        rtol,
        "max |⟨x_i, x_j⟩ − δ_ij|",
        f"rtol = {rtol:g}",
        "print(eigenvectors.conj().T @ eigenvectors[:, {i}])",
    )
    if exact is not None:
        expected = wanted(exact, which, len(values))
        if which == "LM":
            values, expected = values.abs(), expected.abs()
        _assert_wanted(values, expected, rtol * norm)


def assert_calibrated(
    errors: Sequence[float] | Tensor,
    standard_errors: Sequence[float] | Tensor,
    *,
    level: float = 0.95,
    within: float = 2.0,
    conservative: bool = True,
) -> None:
    """At least ``level`` of the errors are within so many standard errors, as far as N can tell.

    Fails where fewer are than a right method gives once in 10⁶, by the binomial distribution;
    with ``conservative=False`` also where so many are that the bars must be too long.
    """
    e, s = (torch.as_tensor(t, dtype=torch.float64).flatten() for t in (errors, standard_errors))
    if e.shape != s.shape or not len(e):
        raise OptionError(
            f"expected as many standard errors as errors, got {len(s)} and {len(e)}; "
            "pass one of each for every seed"
        )
    if not 0 < level < 1:
        raise OptionError(f"expected a level between 0 and 1, got {level}; leave it out for 0.95")
    bad = ~e.isfinite() | s.isnan()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise AssertionError(
            f"{int(bad.sum())} of {len(e)} errors or standard errors are NaN or infinite, the "
            f"first number {i}: {float(e[i]):g} with a standard error of {float(s[i]):g}"
        )
    # Rounding has no part in a standard error: a zero error with a zero bar is covered.
    covered = int((e.abs() <= within * s).sum())
    least, most = (float(binom.ppf(p, len(e), level)) for p in (_ONE_IN, 1 - _ONE_IN))
    ratio = float(((e**2).mean() / (s**2).mean()).sqrt())
    worst = int((e.abs() / s).nan_to_num(0.0).argmax())
    facts = (
        f"{covered} of {len(e)} errors are within {within:g} standard errors, where {level:.0%} "
        f"should be; rms(error) / rms(standard error) = {ratio:.2f}; the worst is number {worst}, "
        f"off by {float(e[worst]):.3g} with a standard error of {float(s[worst]):.3g}"
    )
    if covered < least:
        raise AssertionError(f"error bars are too short: {facts} (at least {int(least)} for N)")
    if not conservative and covered > most:
        raise AssertionError(f"error bars are too long: {facts} (at most {int(most)} for N)")


def _assert_below(defects: Tensor, bound: float, what: str, limit: str, line: str) -> None:
    # ``not (≤)`` so that NaN comes to light.
    if not bool((defects <= bound).all() and defects.isfinite().all()):
        worst = int(defects.nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"expected {what} within {limit}, got {float(defects[worst]):.3g} for pair {worst + 1} "
            f"of {len(defects)}.\nReproduce:\n    {line.replace('{i}', str(worst))}"
        )


def _assert_wanted(values: Tensor, exact: Tensor, distance: float) -> None:
    found, exact = (t.sort(descending=True).values for t in (values, exact))
    off = (found - exact).abs()
    if not bool((off <= distance).all()):
        i = int((off > distance).nonzero()[0])
        copies = int(((found - found[i]).abs() <= distance).sum())
        multiplicity = int(((exact - found[i]).abs() <= distance).sum())
        raise AssertionError(
            f"expected the eigenvalues {_listed(exact)}, got {_listed(found)}: "
            f"{found[i]:.10g} came {copies} times and is wanted {multiplicity} times"
        )


def _listed(values: Tensor) -> str:
    shown = ", ".join(f"{x:.6g}" for x in values[:10].tolist())
    return f"[{shown}{', ...' if len(values) > 10 else ''}]"
