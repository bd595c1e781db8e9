"""The file of a Lanczos run: which options have to agree, and what the run was begun with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torchlinop.algorithms.checkpoint import Checkpoint
from torchlinop.algorithms.eigen_request import Request
from torchlinop.algorithms.krylov_schur import Run
from torchlinop.errors import OptionError


class RunFile:
    """Where a run is saved, and what was saved there by the one that it continues.

    Budgets of products and time may be others than those of the saved run.

    Raises:
        OptionError: the file is of a run with other options, or cannot be written; the request
            is one without restarts.
    """

    def __init__(self, path: str | Path | None, request: Request, seed: int) -> None:
        self.checkpoint = None if path is None else _checkpoint(path, request, seed)
        self.saved = self.checkpoint.load() if self.checkpoint else None

    def as_begun(self, request: Request) -> Request:
        """The request with the sizes of the saved run, whatever memory and timings are now."""
        if self.saved is None:
            return request
        _, numbers = self.saved
        return replace(request, ncv=numbers["ncv"], block_size=numbers["block_size"])

    def resume(self, run: Run) -> None:
        """Have the run stand where the saved one stood, and save to the same file.

        Raises:
            OptionError: that was a run with another matrix.
        """
        run.checkpoint = self.checkpoint
        if self.saved is not None:
            run.resume(*self.saved)


def _checkpoint(path: str | Path, request: Request, seed: int) -> Checkpoint:
    if request.unrestarted:
        raise OptionError(
            f"reorthogonalize={request.mode!r} cannot be continued from a checkpoint; leave out "
            'checkpoint, or take reorthogonalize="full"'
        )
    options = {
        "algorithm": "lanczos",
        "n": request.op.size,
        "dtype": request.op.dtype,
        "k": request.k,
        "which": request.which,
        "tol": request.target().tol,
        "ncv": request.ncv,
        "block_size": request.block_size,
        "seed": seed,
        "basis_dtype": request.basis_dtype,
    }
    return Checkpoint(path, options, request.op.space)
