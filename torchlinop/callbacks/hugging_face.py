"""A TrainerCallback of Hugging Face transformers, which logs what a CurvatureWatch measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchlinop.callbacks.watch import CurvatureWatch
from torchlinop.errors import OptionError

Log = Callable[[dict[str, float]], object]


def hugging_face_callback(watch: CurvatureWatch, log: Log | None = None) -> Any:
    """A ``transformers.TrainerCallback``: ``watch`` at the start and after optimiser steps.

    ``trainer.add_callback(hugging_face_callback(watch, trainer.log))`` sends the numbers where
    the Trainer sends its own: TensorBoard, W&B, ``trainer.state.log_history``. Without ``log``
    they go to the last of these alone. All processes measure, and the Trainer logs on one.

    Raises:
        OptionError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback  # noqa: PLC0415  # an optional package
    except ImportError as error:
        raise OptionError(
            'hugging_face_callback needs transformers; run: pip install "torchlinop[hf]"'
        ) from error

    class CurvatureCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Logs what ``watch`` measures."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            self._look(state, control, parts["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            self._look(state, control, parts["model"])

        def _look(self, state: Any, control: Any, model: Any) -> None:
            scalars = watch(state.global_step, model)
            if scalars and log is None:
                state.log_history.append(scalars | {"step": state.global_step})
            elif scalars and log is not None:
                # Trainer.log takes the logging of the loss, due at the same step, for done.
                due = control.should_log
                log(dict(scalars))
                control.should_log = due

    return CurvatureCallback()
