"""Curvature at every n-th step of training, which goes on as if nothing had been measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn

from torchlinop.algorithms.result import Result, optional
from torchlinop.callbacks.measures import Measure, TopEigenvalues
from torchlinop.errors import OptionError, TorchlinopError, TorchlinopWarning, warn_caller
from torchlinop.model_state import given_back, unwrap
from torchlinop.operators.base import CurvatureOperator
from torchlinop.random_state import preserved_random_state


class CurvatureWatch:
    """Asks ``measures`` of ``operator_of(model)`` whenever ``every`` divides the step.

    Call it with the number of steps done and the model, before training and after every step.
    Parameters, gradients, buffers, modes, hooks and random states are bit by bit what they were,
    so that training is the same as without it. Measure on a batch that is held out, or held
    fixed: then one matrix is followed, not its noise.

    An error at the first measurement is raised. Later ones do not end a long training: they are
    warned of, and their step has no numbers. Ctrl-C ends the training as ever.

    Costs what the operator and the measures cost, every time.

    Args:
        operator_of: from a model to an operator, ``lambda model: HessianOperator(model, [batch],
            loss_fn)`` say. The model is in evaluation mode.
        measures: what to ask: ``TopEigenvalues``, ``Trace``, ``Density``, or one's own.
        every: how many steps from one measurement to the next.
        name: what the names of numbers begin with.

    Raises:
        OptionError: ``every`` is less than 1, or there is nothing to measure.

    Example:
        >>> from torchlinop import HessianOperator
        >>> model, batch = nn.Linear(3, 1), (torch.ones(4, 3), torch.zeros(4, 1))
        >>> loss_fn = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
        >>> hessian_of = lambda model: HessianOperator(model, [batch], loss_fn)
        >>> watch = CurvatureWatch(hessian_of, [TopEigenvalues(k=1)], every=10)
        >>> round(watch(0, model)["curvature/eigenvalue_1"], 4)
        8.0
        >>> watch(1, model)
        {}
    """

    def __init__(
        self,
        operator_of: Callable[[Any], CurvatureOperator],
        measures: Sequence[Measure[Any]] = (TopEigenvalues(),),
        *,
        every: int = 100,
        name: str = "curvature",
    ) -> None:
        if not (isinstance(every, int) and every >= 1):
            raise OptionError(f"expected every to be at least 1, got {every!r}; 100, say")
        if not measures:
            raise OptionError("expected something to measure, got none; pass [TopEigenvalues()]")
        self.measures = tuple(measures)
        self.every = every
        self.name = name
        self.history: list[dict[str, float]] = []  # a row a measurement: "step", then the numbers
        self.results: tuple[Result | None, ...] = (None,) * len(self.measures)  # the last ones
        self._operator_of = operator_of

    def __call__(self, step: int, model: nn.Module) -> dict[str, float]:
        """The numbers of this step; empty where it is not the time for any, or they failed.

        Raises:
            TorchlinopError: the first measurement failed.
        """
        if step % self.every or (self.history and self.history[-1]["step"] == step):
            return {}
        try:
            scalars = self._measured(model)
        except TorchlinopError as error:
            if not self.history:
                raise
            warn_caller(
                f"curvature was not measured at step {step}: {type(error).__name__}: {error}. "
                "Training goes on; call the operator by hand to see where",
                TorchlinopWarning,
            )
            scalars = {}
        self.history.append({"step": step, **scalars})
        return scalars

    def scalars(self) -> dict[str, float]:
        """The numbers of the last measurement."""
        return {k: v for row in self.history[-1:] for k, v in row.items() if k != "step"}

    def to_dataframe(self) -> Any:
        """The history as a pandas DataFrame, a row a measurement.

        Raises:
            OptionError: pandas is not installed.
        """
        return optional("pandas").DataFrame(self.history)

    def _measured(self, model: nn.Module) -> dict[str, float]:
        started = time.perf_counter()
        with _as_if_untouched(model):
            op = self._operator_of(model)
            pairs = zip(self.measures, self.results, strict=True)
            results = tuple(_uninterrupted(measure(op, last)) for measure, last in pairs)
        self.results = results
        numbers: dict[str, float] = {}
        for measure, result in zip(self.measures, results, strict=True):
            numbers |= measure.scalars(result)
        numbers["seconds"] = time.perf_counter() - started
        return {f"{self.name}/{name}": value for name, value in numbers.items()}

    def __repr__(self) -> str:
        asked = ", ".join(map(repr, self.measures))
        return f"<CurvatureWatch every {self.every} steps | {asked} | {len(self.history)} rows>"


@contextmanager
def _as_if_untouched(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and as it computes without autocast; all put back after."""
    module = unwrap(model)
    devices = {p.device for p in module.parameters()} | {torch.device("cpu")}
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(preserved_random_state(device))
        stack.enter_context(given_back(module))
        module.eval()  # said here, so that no operator has to warn of it
        if "_original_forward" in vars(module):  # accelerate has wrapped autocast around it
            module.forward = cast(Callable[..., Any], module._original_forward)
        yield


def _uninterrupted(result: Any) -> Any:
    """The result; where Ctrl-C ended it early, that is passed on to the training."""
    notes = (getattr(result, "status", ""), *getattr(result, "warnings", ()))
    if any(str(note).startswith("interrupted") for note in notes):
        raise KeyboardInterrupt
    return result
