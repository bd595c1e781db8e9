"""How a spectrum is computed: the options of the field's scripts, by their names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from torchlinop.algorithms.sizes import refuse_fractions, refuse_non_numbers
from torchlinop.choices import refuse_unknown
from torchlinop.errors import OptionError

ReorthMode = Literal["auto", "full", "partial", "selective", "local", "off", "none"]
RegularizationMode = Literal["off", "fixed", "relative", "auto"]

_MODES = {"auto": "full", "selective": "local", "off": "none"}  # others have their name in lanczos


@dataclass(frozen=True)
class LanczosConfig:
    """How a spectrum is computed. Names are those of the field's scripts; meanings are these.

    Three options of such scripts can only be left alone: what they describe makes results worse.
    Orthogonalising against a window of ``reorth_window`` vectors leaves nearly as many copies of
    converged eigenvalues as doing nothing; doing it every ``reorth_period`` steps loses
    orthogonality altogether; emptying the cache every ``gc_every`` products frees no memory that
    is in use. Memory is saved by restarting, which ``"auto"`` and ``"full"`` do.

    Raises:
        OptionError: an option has a value that is not among its choices.
    """

    k: int = 10
    max_iters: int | None = None  # the budget of products; steps, if there are no restarts
    tol: float | None = None  # of ‖A x − λ x‖ / |λ|; by the dtype unless given, see lanczos
    # "auto" is "full", with restarts; "selective" is "local", the last five vectors; "off" is
    # "none". In these two converged eigenvalues come in copies; those that agree to rounding are
    # reported once, others may be among the k, which have not converged then.
    reorth_mode: ReorthMode = "auto"
    reorth_period: int = 0  # has no effect
    reorth_window: int = 0  # has no effect
    dtype_compute: torch.dtype | None = None  # a copy of the model is evaluated in this dtype
    dtype_tridiag: torch.dtype = torch.float64  # nothing else
    seed: int = 42
    # What is added to the eigenvalues of a positive semidefinite matrix: nothing, `regularization`,
    # or as many times the largest eigenvalue; "auto" does the last where the k eigenvalues have a
    # condition number above 1e12, as where the matrix has a smaller rank.
    regularization_mode: RegularizationMode = "auto"
    regularization: float = 1e-8
    gc_every: int = 0  # has no effect
    num_probes: int = 4  # of the quadrature that finds negative masses; 0 leaves them out
    num_steps: int = 40  # of each

    def __post_init__(self) -> None:
        refuse_unknown("reorth_mode", self.reorth_mode, get_args(ReorthMode))
        modes = get_args(RegularizationMode)
        refuse_unknown("regularization_mode", self.regularization_mode, modes)
        refuse_non_numbers(regularization=self.regularization)
        if not 0 <= self.regularization < math.inf:
            raise OptionError(
                f"expected regularization from 0 on, got {self.regularization}; pass 1e-8, say"
            )
        if self.dtype_tridiag != torch.float64:
            raise OptionError(
                f"expected dtype_tridiag to be torch.float64, got {self.dtype_tridiag}: small "
                "matrices cost nothing; leave it out"
            )
        refuse_fractions(num_probes=self.num_probes, num_steps=self.num_steps)
        if self.num_probes < 0 or self.num_steps < 1:
            raise OptionError(
                f"expected num_probes from 0 and num_steps from 1 on, got {self.num_probes} and "
                f"{self.num_steps}; leave them out for 4 and 40"
            )

    @property
    def reorthogonalize(self) -> str:
        """The mode, by its name in ``lanczos``."""
        return _MODES.get(self.reorth_mode, self.reorth_mode)

    @property
    def ignored(self) -> list[str]:
        """What was asked for and is not done, a sentence each."""
        names = ("reorth_period", "reorth_window", "gc_every")
        return [
            f"{name}={getattr(self, name)} has no effect, see LanczosConfig; leave it out"
            for name in names
            if getattr(self, name)
        ]
