"""The largest eigenvalues of a curvature matrix, and what is read from them, in one call."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.given_operator import refuse_no_operator
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.batches import Batch, tree_map
from torchlinop.errors import OptionError, TorchlinopWarning, warn_caller
from torchlinop.losses.of_model import ForwardFn
from torchlinop.model_state import unwrap
from torchlinop.objective import LossFn
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.counting import CountingOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.operators.kronecker import KroneckerOperator
from torchlinop.spectrum.by_name import (
    GGNMode,
    LossWithoutArguments,
    OperatorType,
    create_operator,
    takes_nothing,
)
from torchlinop.spectrum.config import LanczosConfig
from torchlinop.spectrum.readings import condition, noise, of_indefinite, of_psd
from torchlinop.spectrum.result import SpectrumResult

_SINGULAR = 1e12  # a condition number from which "auto" regularises


def compute_spectrum(  # noqa: PLR0917  # in the order that callers know
    model: nn.Module,
    batch: Batch,
    operator_type: OperatorType = "ggn",
    config: LanczosConfig | None = None,
    loss_fn: LossFn | LossWithoutArguments | None = None,
    kfac_factors: KroneckerOperator | None = None,
    ggn_mode: GGNMode = "true",
    verbose: bool = False,
    *,
    forward_fn: ForwardFn | None = None,
    loss_of_output_fn: Any = None,
    **options: Any,
) -> SpectrumResult:
    """The k eigenvalues of largest size of a curvature matrix of a model, and what they tell.

    It is ``lanczos_algorithm(create_operator(...), config, verbose)``; arguments and errors are
    those of the two. For eigenvectors, and all else that a solver can be asked, call
    ``lanczos(create_operator(...))``.

    Raises:
        OptionError: as these two; and ``config.dtype_compute`` is not that of the model, whose
            copy a ``loss_fn`` without arguments would not see.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> batch = (torch.randn(32, 4), torch.randint(0, 3, (32,)))
        >>> result = compute_spectrum(model, batch, "ggn", LanczosConfig(k=3))
        >>> result.is_psd, result.converged
        (True, True)
    """
    config = _checked(config)
    if config.dtype_compute is not None and not _is_in(model, config.dtype_compute):
        if loss_fn is not None and takes_nothing(loss_fn):
            raise OptionError(
                f"expected loss_fn(model, batch), as dtype_compute={config.dtype_compute} asks for "
                "a copy of the model, got a function without arguments, which evaluates the "
                "original; pass lambda model, batch: model(**batch).loss, say"
            )
        model, batch = _in_dtype(model, batch, config.dtype_compute)
    op = create_operator(
        operator_type,
        model,
        batch,
        loss_fn,
        kfac_factors,
        ggn_mode=ggn_mode,
        forward_fn=forward_fn,
        loss_of_output_fn=loss_of_output_fn,
        **options,
    )
    return lanczos_algorithm(op, config, verbose)


def lanczos_algorithm(
    op: CurvatureOperator, config: LanczosConfig | None = None, verbose: bool = False
) -> SpectrumResult:
    """The k eigenvalues of largest size of any operator, and what they tell; a bar if ``verbose``.

    Costs the products of ``lanczos``; for an indefinite matrix further ones for an end of the
    spectrum that is not among the k, and ``num_probes num_steps`` (n at most) for the masses.
    Ctrl-C returns what there is, without these.

    Raises:
        OptionError: as ``lanczos``; and what products raise.
    """
    refuse_no_operator(op)
    started = time.perf_counter()
    config = _checked(config)
    warnings = config.ignored
    for message in warnings:
        warn_caller(message, TorchlinopWarning)
    counted = CountingOperator(op)
    found = lanczos(
        counted,
        config.k,
        config.max_iters,
        tol=config.tol,
        seed=config.seed,
        reorthogonalize=config.reorthogonalize,
        progress=verbose,
    )
    warnings += [*_of_coarse(op), *found.warnings]
    return _result(counted, config, found, warnings, started)


def _checked(config: LanczosConfig | None) -> LanczosConfig:
    config = LanczosConfig() if config is None else config
    if not isinstance(config, LanczosConfig):
        raise OptionError(
            f"expected config to be a LanczosConfig, got {config!r}; pass LanczosConfig(k=10), say"
        )
    return config


def _is_in(model: nn.Module, dtype: torch.dtype) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    return all(t.dtype == dtype for t in tensors if t.is_floating_point())


def _in_dtype(model: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[nn.Module, Batch]:
    """Copies in this dtype; integers stay what they are."""

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    return copy.deepcopy(unwrap(model)).to(dtype), tree_map(cast, batch)


def _of_coarse(op: CurvatureOperator) -> list[str]:
    """What coarse parameters do to the numbers; the operator has warned of it when it was built."""
    if op.layout is None or torch.finfo(op.layout.precision).eps <= torch.finfo(op.dtype).eps:
        return []
    return [
        f"parameters in {op.layout.precision} make products noisy: eigenvalues below about "
        f"{noise(op):.0e} of the largest are not meaningful; pass dtype_compute={op.dtype}"
    ]


def _result(
    op: CountingOperator,
    config: LanczosConfig,
    found: EigenResult,
    warnings: list[str],
    started: float,
) -> SpectrumResult:
    order = torch.argsort(found.eigenvalues.double(), descending=True, stable=True)
    values = found.eigenvalues.double()[order].cpu()
    bounds = found.error_bounds[order].cpu()
    rounding = noise(op) * float(values.abs().max())
    errors = bounds.clamp_min(rounding)
    if found.possible_multiplicity:
        warnings.append(
            "some eigenvalues agree up to their errors: there may be more copies of them; "
            "lanczos with a larger block_size counts them"
        )
    # A Ritz value below zero proves that an eigenvalue is, converged or not.
    negative = bool((values < -rounding).any())
    # Nothing else proves that the loss of a GGN, if it is a function of the user's, is not convex.
    promised = op.positive_semidefinite or isinstance(op.operator, GGNOperator)
    if promised and negative:
        warnings.append(_not_convex(op.operator, float(values[-1])))
    is_psd = promised and not negative
    shift = _regularization(config, values, errors, is_psd, warnings)
    values = values + shift
    if is_psd:
        numbers = of_psd(values, errors)
    else:
        further = found.status != "interrupted"
        numbers = of_indefinite(op, config, values, errors, warnings, further=further)
    return SpectrumResult(
        eigenvalues=values,
        ritz_residuals=found.residual_norms[order].cpu(),
        error_bounds=bounds,
        operator=type(op.operator).__name__,
        is_psd=is_psd,
        iterations=found.matvecs,
        operator_calls=op.matvecs,
        converged=bool(found.converged.all()),
        n_params=op.size,
        seed=config.seed,
        reorth_mode=config.reorthogonalize,
        regularization_applied=shift,
        dtype=op.dtype,
        seconds=time.perf_counter() - started,
        warnings=tuple(warnings),
        **dataclasses.asdict(numbers),
    )


def _not_convex(op: CurvatureOperator, smallest: float) -> str:
    message = (
        f"{type(op).__name__} has an eigenvalue of {smallest:.3g}, but should have none below "
        "zero: the loss is not convex in the outputs; numbers are those of an indefinite matrix"
    )
    warn_caller(message, TorchlinopWarning)
    return message


def _regularization(
    config: LanczosConfig, values: Tensor, errors: Tensor, is_psd: bool, warnings: list[str]
) -> float:
    """What is added to the eigenvalues (k,), descending."""
    mode, largest = config.regularization_mode, float(values[0])
    if not is_psd:
        if mode in ("fixed", "relative"):
            warnings.append(f"regularization_mode={mode!r} leaves indefinite matrices as they are")
        return 0.0
    if mode == "auto" and condition(values, errors) <= _SINGULAR:
        return 0.0
    shift = {
        "off": 0.0,
        "fixed": config.regularization,
        "relative": largest * config.regularization,
        "auto": largest * config.regularization,
    }[mode]
    if shift:
        warnings.append(f"{shift:.3g} was added to all eigenvalues: regularization_mode={mode!r}")
    return shift
