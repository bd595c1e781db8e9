"""The ends of a model's curvature spectrum, and what is read from them: gap, condition, sharpness.

The one place among the algorithms that knows operators by name.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from torchlinop.algorithms.atoms import standard_error
from torchlinop.algorithms.eigen_result import EigenResult
from torchlinop.algorithms.lanczos import lanczos
from torchlinop.algorithms.products import breakdown
from torchlinop.algorithms.quadrature import slq
from torchlinop.algorithms.result import Result
from torchlinop.batches import Batch, tree_map
from torchlinop.errors import OptionError, TorchlinopWarning, warn_caller
from torchlinop.losses.base import LossOfOutput
from torchlinop.losses.cross_entropy import CrossEntropy
from torchlinop.losses.elementwise import MeanSquaredError
from torchlinop.losses.huggingface import (
    hf_lm_forward,
    hf_lm_loss_of_output,
    hf_seq2seq_loss_of_output,
)
from torchlinop.losses.of_model import ForwardFn, LossOfModel
from torchlinop.losses.recognition import loss_of_output
from torchlinop.losses.supervised import supervised_forward
from torchlinop.losses.targets import named_parts, targets_of
from torchlinop.model_state import unwrap
from torchlinop.objective import LossFn
from torchlinop.operators.base import CurvatureOperator
from torchlinop.operators.counting import CountingOperator
from torchlinop.operators.empirical_fisher import EmpiricalFisherOperator
from torchlinop.operators.gauss_newton import GGNOperator
from torchlinop.operators.hessian import HessianOperator
from torchlinop.operators.kfac import KFACOperator
from torchlinop.operators.kronecker import KroneckerOperator

OperatorType = Literal["hessian", "ggn", "empirical_fisher", "kfac"]
GGNMode = Literal["true", "empirical", "auto"]
ReorthMode = Literal["auto", "full", "partial", "selective", "local", "off", "none"]
RegularizationMode = Literal["off", "fixed", "relative", "auto"]

_PSD = ("ggn", "empirical_fisher", "kfac")
_MODES = {"auto": "full", "selective": "local", "off": "none"}  # others have their name in lanczos
_SINGULAR = 1e12  # a condition number from which "auto" regularises
_END_TOL = 1e-4  # of ‖A‖: the residual of an end of the spectrum that is not among the k
_SHOWN = 5  # eigenvalues in a repr


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
    # "none". Without restarts, converged eigenvalues come in copies, of which one each is kept.
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
        _refuse_unknown("reorth_mode", self.reorth_mode, get_args(ReorthMode))
        modes = get_args(RegularizationMode)
        _refuse_unknown("regularization_mode", self.regularization_mode, modes)
        if not 0 <= self.regularization < math.inf:
            raise OptionError(
                f"expected regularization from 0 on, got {self.regularization}; pass 1e-8, say"
            )
        if self.dtype_tridiag != torch.float64:
            raise OptionError(
                f"expected dtype_tridiag to be torch.float64, got {self.dtype_tridiag}: small "
                "matrices cost nothing; leave it out"
            )
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


@dataclass(frozen=True, repr=False)
class SpectrumResult(Result):
    """The k eigenvalues of largest size, and what is read from them. ``result["name"]`` works too.

    Numbers of positive semidefinite matrices are NaN for indefinite ones, and the other way round.
    """

    eigenvalues: Tensor  # (k,) float64, descending, with regularization_applied
    ritz_residuals: Tensor  # (k,) ‖A x − λ x‖
    error_bounds: Tensor  # (k,) an eigenvalue is this near
    operator: str
    is_psd: bool  # no eigenvalue is negative, by the kind of matrix, and none was found
    iterations: int  # products for these eigenvalues
    operator_calls: int  # products in all
    converged: bool
    n_params: int
    seed: int
    reorth_mode: str  # as in lanczos
    regularization_applied: float
    max_eigenvalue: float
    # Of the k if positive semidefinite; else of the matrix, as is max_eigenvalue: to a residual of
    # 1e-4 ‖A‖, if it is not among the k.
    min_eigenvalue: float
    # Of positive semidefinite matrices. The latter two are of the k eigenvalues: not of the matrix.
    spectral_gap: float  # λ₁ − λ₂
    ritz_condition_number: float  # λ₁ / λ_k, infinite if that is zero to rounding
    ritz_effective_rank: float  # (Σ λ)² / Σ λ²
    # Of indefinite matrices.
    has_negative_eigenvalues: bool  # beyond rounding
    n_negative: int  # of the k, beyond their error bounds
    range_ratio: float  # |λ_max| / |λ_min|
    sharpness_score: float  # max |λ|
    most_negative_eigenvalue: float  # of the matrix; 0 if there is none
    # Of all n eigenvalues, not of the k: by quadrature, or exactly where that costs no more.
    negative_fraction: float
    negative_fraction_low: float  # with probability 0.95 above this
    negative_fraction_high: float  # and below this
    negative_mass: float  # Σ_{λ < 0} |λ| / Σ |λ|
    negative_mass_stderr: float  # of the probes
    dtype: torch.dtype
    seconds: float
    warnings: tuple[str, ...]

    _columns: ClassVar[tuple[str, ...]] = ("eigenvalues", "ritz_residuals", "error_bounds")

    def __getitem__(self, name: str) -> Any:
        if name not in self._values():
            raise KeyError(name)
        return getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, tensors as lists."""
        values = self._values().items()
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values}

    def __repr__(self) -> str:
        kind = "positive semidefinite" if self.is_psd else "indefinite"
        state = "converged" if self.converged else "not converged"
        listed = [f"{value:.6g}" for value in self.eigenvalues[:_SHOWN].tolist()]
        listed += ["..."] if len(self.eigenvalues) > _SHOWN else []
        read = self._read_of_psd() if self.is_psd else self._read_of_indefinite()
        lines = [
            f"SpectrumResult  {self.operator} | {kind} | n = {self.n_params:,} | {state} | "
            f"{self.operator_calls} products | {self.seconds:.1f} s | seed {self.seed}",
            f"  {len(self.eigenvalues)} eigenvalues  {', '.join(listed)}",
            f"  residuals at most {float(self.ritz_residuals.max()):.1e}",
            *read,
            f"  warnings: {'; '.join(self.warnings) or 'none'}",
        ]
        return "\n".join(lines)

    def _read_of_psd(self) -> list[str]:
        return [
            f"  gap {self.spectral_gap:.4g} | of these eigenvalues: condition number "
            f"{self.ritz_condition_number:.4g}, effective rank {self.ritz_effective_rank:.4g}",
            f"  regularization {self.regularization_applied:.4g}",
        ]

    def _read_of_indefinite(self) -> list[str]:
        return [
            f"  from {self.min_eigenvalue:.6g} to {self.max_eigenvalue:.6g} | sharpness "
            f"{self.sharpness_score:.4g} | range ratio {self.range_ratio:.4g}",
            f"  negative: {self.negative_fraction:.2%} of all eigenvalues, 95 % "
            f"[{self.negative_fraction_low:.2%}, {self.negative_fraction_high:.2%}]; "
            f"{self.negative_mass:.2%} +- {self.negative_mass_stderr:.1%} of their sizes",
        ]


def create_operator(  # noqa: PLR0917  # in the order that callers know
    operator_type: OperatorType,
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn | None = None,
    kfac_factors: KroneckerOperator | None = None,
    ggn_mode: GGNMode = "true",
    *,
    forward_fn: ForwardFn | None = None,
    loss_of_output_fn: Any = None,
    **options: Any,
) -> CurvatureOperator:
    """A curvature matrix of the model on one batch, by name.

    Where no loss is given it is chosen by the batch: with ``input_ids`` and labels for tokens (or
    none), the cross-entropy of a language model, of next tokens unless it is an encoder-decoder or
    labels tokens themselves; else cross-entropy for integer targets, and the mean squared error
    for others.

    Args:
        operator_type: ``"hessian"``, ``"ggn"``, ``"empirical_fisher"`` or ``"kfac"``.
        model: as for the operators.
        batch: one, not a list of them.
        loss_fn: ``(model, batch) -> scalar``, for the Hessian and the empirical Fisher matrix.
        kfac_factors: a ``KroneckerOperator`` computed or loaded before, taken as it is.
        ggn_mode: ``"empirical"`` makes the GGN the empirical Fisher matrix, which is another
            matrix; ``"auto"`` is ``"true"``.
        forward_fn: ``(model, batch) -> outputs``, for all four.
        loss_of_output_fn: as for ``GGNOperator``, for all four.
        **options: of the operator.

    Raises:
        OptionError: an unknown name, or a loss that does not fit the operator; and as the operator.
    """
    _refuse_unknown("operator_type", operator_type, get_args(OperatorType))
    _refuse_unknown("ggn_mode", ggn_mode, get_args(GGNMode))
    if kfac_factors is not None:
        return _given(operator_type, kfac_factors)
    if operator_type == "ggn" and ggn_mode == "empirical":
        operator_type = "empirical_fisher"
    if loss_fn is not None:
        _refuse_other_losses(operator_type, forward_fn, loss_of_output_fn)
        _refuse_closure(loss_fn, model, batch)
        return _OF_MODEL[operator_type](model, [batch], loss_fn, **options)
    forward, loss = _pieces(model, batch, forward_fn, loss_of_output_fn)
    return _OF_OUTPUTS[operator_type](model, [batch], forward, loss, **options)


def compute_spectrum(  # noqa: PLR0917  # in the order that callers know
    model: nn.Module,
    batch: Batch,
    operator_type: OperatorType = "ggn",
    config: LanczosConfig | None = None,
    loss_fn: LossFn | None = None,
    kfac_factors: KroneckerOperator | None = None,
    ggn_mode: GGNMode = "true",
    verbose: bool = False,
    *,
    forward_fn: ForwardFn | None = None,
    loss_of_output_fn: Any = None,
    **options: Any,
) -> SpectrumResult:
    """The k eigenvalues of largest size of a curvature matrix of a model, and what they tell.

    Arguments are those of ``create_operator``; ``verbose`` shows a bar that counts products. For
    eigenvectors, and all else that a solver can be asked, call ``lanczos(create_operator(...))``.

    Costs the products of ``lanczos``; for an indefinite matrix further ones for an end of the
    spectrum that is not among the k, and ``num_probes num_steps`` (n at most) for the masses.

    Raises:
        OptionError: as ``create_operator`` and ``lanczos``; and what products raise.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> batch = (torch.randn(32, 4), torch.randint(0, 3, (32,)))
        >>> result = compute_spectrum(model, batch, "ggn", LanczosConfig(k=3))
        >>> result.is_psd, result.converged
        (True, True)
    """
    started = time.perf_counter()
    config = config or LanczosConfig()
    warnings = config.ignored
    for message in warnings:
        warn_caller(message, TorchlinopWarning)
    if config.dtype_compute is not None:
        model, batch = _in_dtype(model, batch, config.dtype_compute)
    op = CountingOperator(
        create_operator(
            operator_type,
            model,
            batch,
            loss_fn,
            kfac_factors,
            ggn_mode,
            forward_fn=forward_fn,
            loss_of_output_fn=loss_of_output_fn,
            **options,
        )
    )
    warnings += _of_coarse(op)
    found = lanczos(
        op,
        config.k,
        config.max_iters,
        tol=config.tol,
        seed=config.seed,
        reorthogonalize=config.reorthogonalize,
        progress=verbose,
    )
    warnings += found.warnings
    return _result(op, operator_type, config, found, warnings, started=started)


def _given(operator_type: str, factors: object) -> KroneckerOperator:
    if operator_type != "kfac" or not isinstance(factors, KroneckerOperator):
        raise OptionError(
            'expected kfac_factors to be a KroneckerOperator, with operator_type="kfac", got a '
            f"{type(factors).__name__} with {operator_type!r}; pass KFACOperator(...), or "
            "KroneckerOperator.load(path)"
        )
    return factors


def _hessian_of_outputs(
    model: nn.Module, data: list[Batch], forward: ForwardFn, loss: LossOfOutput, **options: Any
) -> HessianOperator:
    return HessianOperator(model, data, LossOfModel(forward, loss), **options)


_OF_MODEL: Mapping[str, Callable[..., CurvatureOperator]] = {
    "hessian": HessianOperator,
    "empirical_fisher": EmpiricalFisherOperator,
}
_OF_OUTPUTS: Mapping[str, Callable[..., CurvatureOperator]] = {
    "hessian": _hessian_of_outputs,
    "ggn": GGNOperator,
    "empirical_fisher": EmpiricalFisherOperator,
    "kfac": KFACOperator,
}

# Heads of Hugging Face whose labels are for the token at their position.
_ALIGNED = ("ForMaskedLM", "ForTokenClassification")


def _pieces(
    model: nn.Module, batch: Batch, forward_fn: ForwardFn | None, loss: Any
) -> tuple[ForwardFn, LossOfOutput]:
    """The forward function and the loss of outputs: those given, or those that fit the batch."""
    of_tokens = _is_of_tokens(batch)
    forward = forward_fn or (hf_lm_forward() if of_tokens else supervised_forward)
    if loss is not None:
        return forward, loss_of_output(loss)
    if of_tokens:
        module = unwrap(model)
        aligned = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        aligned = aligned or type(module).__name__.endswith(_ALIGNED)
        return forward, hf_seq2seq_loss_of_output() if aligned else hf_lm_loss_of_output()
    real = targets_of(batch).is_floating_point()
    return forward, MeanSquaredError() if real else CrossEntropy()


def _is_of_tokens(batch: Batch) -> bool:
    named = named_parts(batch)
    if named is None or "input_ids" not in named:
        return False
    labels = named.get("labels")
    return labels is None or labels.ndim > 1


def _refuse_unknown(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def _refuse_other_losses(operator_type: str, forward_fn: object, loss_of_output_fn: object) -> None:
    if operator_type not in _OF_MODEL:
        raise OptionError(
            f"expected the loss of {operator_type!r} as a function of outputs, got loss_fn; pass "
            "forward_fn and loss_of_output_fn in its place"
        )
    if forward_fn is not None or loss_of_output_fn is not None:
        raise OptionError(
            "expected loss_fn, or forward_fn and loss_of_output_fn, got some of both; "
            "leave out loss_fn"
        )


def _refuse_closure(loss_fn: Callable[..., Any], model: nn.Module, batch: Batch) -> None:
    try:
        inspect.signature(loss_fn).bind(model, batch)
    except TypeError as error:
        raise OptionError(
            f"expected loss_fn(model, batch), got {loss_fn!r}, which takes other arguments; a "
            "function that evaluates its own copy of the model cannot be differentiated here: "
            "pass lambda model, batch: model(**batch).loss, say"
        ) from error
    except ValueError:  # a callable that does not tell
        return


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
        f"{_noise(op):.0e} of the largest are not meaningful; pass dtype_compute={op.dtype}"
    ]


def _noise(op: CurvatureOperator) -> float:
    """Of eigenvalues, relative to ‖A‖: whose sign is not known below."""
    precision = op.layout.precision if op.layout else op.dtype
    return max(breakdown(op.dtype), torch.finfo(precision).eps)


def _result(
    op: CountingOperator,
    operator_type: str,
    config: LanczosConfig,
    found: EigenResult,
    warnings: list[str],
    *,
    started: float,
) -> SpectrumResult:
    order = torch.argsort(found.eigenvalues.double(), descending=True, stable=True)
    values = found.eigenvalues.double()[order].cpu()
    bounds = found.error_bounds[order].cpu()
    rounding = _noise(op) * float(values.abs().max())
    errors = bounds.clamp_min(rounding)
    if found.possible_multiplicity:
        warnings.append(
            "some eigenvalues agree up to their errors: there may be more copies of them; "
            "lanczos with a larger block_size counts them"
        )
    promised = operator_type in _PSD
    # A Ritz value below zero proves that an eigenvalue is, converged or not.
    is_psd = promised and not bool((values < -rounding).any())
    if promised and not is_psd:
        message = (
            f"{operator_type} has an eigenvalue of {float(values[-1]):.3g}, but should have none "
            "below zero: the loss is not convex in the outputs; numbers are those of an "
            "indefinite matrix"
        )
        warn_caller(message, TorchlinopWarning)
        warnings.append(message)
    shift = _regularization(config, values, errors, is_psd, warnings)
    values = values + shift
    numbers = _of_psd(values, errors) if is_psd else _of_indefinite(op, config, values, errors)
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


def _regularization(
    config: LanczosConfig, values: Tensor, errors: Tensor, is_psd: bool, warnings: list[str]
) -> float:
    """What is added to the eigenvalues (k,), descending."""
    mode, largest = config.regularization_mode, float(values[0])
    if not is_psd:
        if mode in ("fixed", "relative"):
            warnings.append(f"regularization_mode={mode!r} leaves indefinite matrices as they are")
        return 0.0
    if mode == "auto" and _condition(values, errors) <= _SINGULAR:
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


def _condition(values: Tensor, errors: Tensor) -> float:
    """``λ₁ / λ_k`` of descending values, infinite if λ_k is zero to rounding."""
    if float(values[-1]) <= float(errors[-1]):
        return math.inf
    return float(values[0] / values[-1])


@dataclass(frozen=True)
class _Numbers:
    max_eigenvalue: float
    min_eigenvalue: float
    spectral_gap: float = math.nan
    ritz_condition_number: float = math.nan
    ritz_effective_rank: float = math.nan
    has_negative_eigenvalues: bool = False
    n_negative: int = 0
    range_ratio: float = math.nan
    sharpness_score: float = math.nan
    most_negative_eigenvalue: float = math.nan
    negative_fraction: float = math.nan
    negative_fraction_low: float = math.nan
    negative_fraction_high: float = math.nan
    negative_mass: float = math.nan
    negative_mass_stderr: float = math.nan


def _of_psd(values: Tensor, errors: Tensor) -> _Numbers:
    squares = float(values.square().sum())
    return _Numbers(
        max_eigenvalue=float(values[0]),
        min_eigenvalue=float(values[-1]),
        spectral_gap=float(values[0] - values[1]) if len(values) > 1 else math.nan,
        ritz_condition_number=_condition(values, errors),
        ritz_effective_rank=float(values.sum()) ** 2 / squares if squares else 0.0,
    )


def _of_indefinite(
    op: CurvatureOperator, config: LanczosConfig, values: Tensor, errors: Tensor
) -> _Numbers:
    smallest = _end(op, config, values.flip(0), errors.flip(0), "SA")
    largest = _end(op, config, values, errors, "LA")
    norm = float(values.abs().max())
    negative = smallest < -_noise(op) * norm
    return _Numbers(
        max_eigenvalue=largest,
        min_eigenvalue=smallest,
        has_negative_eigenvalues=negative,
        n_negative=int((values < -errors).sum()),
        range_ratio=abs(largest) / abs(smallest) if smallest else math.inf,
        sharpness_score=norm,
        most_negative_eigenvalue=smallest if negative else 0.0,
        **_masses(op, config)._asdict(),
    )


def _end(
    op: CurvatureOperator,
    config: LanczosConfig,
    values: Tensor,
    errors: Tensor,
    which: Literal["SA", "LA"],
) -> float:
    """The eigenvalue at this end: the first of the values, or that of another run.

    Of the k values of largest size, those of one sign are the outermost of that sign.
    """
    sign = 1 if which == "LA" else -1
    if len(values) == op.size or sign * float(values[0]) > float(errors[0]):
        return float(values[0])
    # Shifted, so that the tolerance is one of ‖A‖: relative to an end near zero it would be out of
    # reach, as eigenvalues crowd there.
    norm = sign * float(values.abs().max())
    tol = max(_END_TOL, _noise(op))
    found = lanczos(op.shift(-norm), 1, which=which, tol=tol, seed=config.seed)
    return float(found.eigenvalues[0]) + norm


class _Masses(NamedTuple):
    negative_fraction: float
    negative_fraction_low: float
    negative_fraction_high: float
    negative_mass: float
    negative_mass_stderr: float  # of the probes


def _masses(op: CurvatureOperator, config: LanczosConfig) -> _Masses:
    """How many eigenvalues are negative, and how large they are together."""
    if not config.num_probes:
        return _Masses(*[math.nan] * 5)
    if op.size <= config.num_probes * config.num_steps:
        return _exact_masses(op)
    quadrature = slq(op, config.num_probes, config.num_steps, seed=config.seed)
    fraction = quadrature.negative_mass()
    negative = quadrature.spectral_sum(lambda t: (-t).clamp_min(0)).samples
    total = quadrature.spectral_sum(torch.abs).samples
    mass = float(negative.sum() / total.sum()) if float(total.sum()) else 0.0
    # The delta method, for a ratio of means.
    stderr = standard_error(negative - mass * total) / total.mean()
    return _Masses(*fraction, mass, float(stderr) if float(total.sum()) else 0.0)


def _exact_masses(op: CurvatureOperator) -> _Masses:
    A = op.to_dense().double()
    values = torch.linalg.eigvalsh((A + A.mT) / 2)
    sizes = values.abs()
    below = values < -_noise(op) * sizes.max()
    fraction = float(below.double().mean())
    mass = float(sizes[below].sum() / sizes.sum()) if bool(sizes.any()) else 0.0
    return _Masses(fraction, fraction, fraction, mass, 0.0)
