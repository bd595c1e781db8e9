"""A Callback of Lightning, which logs what a CurvatureWatch measures."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torchlinop.callbacks.watch import CurvatureWatch
from torchlinop.errors import OptionError

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(watch: CurvatureWatch) -> Any:
    """A ``lightning.pytorch.Callback``: ``watch`` at the start and after optimiser steps.

    The model that ``watch`` is given is the LightningModule. Numbers are sent to every logger of
    the Trainer (TensorBoard, W&B, CSV), whatever its ``log_every_n_steps``, and may be monitored:
    ``ModelCheckpoint(monitor="curvature/eigenvalue_1")``. All processes measure, and Lightning
    logs on one.

    Raises:
        OptionError: neither lightning nor pytorch_lightning is installed.
    """

    class CurvatureCallback(_base()):  # type: ignore[misc]
        """Logs what ``watch`` measures."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._look(trainer, pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
            scalars = self._look(trainer, pl_module)
            if scalars:  # for other callbacks to monitor; loggers have them already
                pl_module.log_dict(scalars, logger=False, batch_size=1)

        def _look(self, trainer: Any, pl_module: Any) -> dict[str, float]:
            scalars = watch(trainer.global_step, pl_module)
            for logger in trainer.loggers if scalars else ():
                logger.log_metrics(scalars, step=trainer.global_step)
            return scalars

    return CurvatureCallback()


def _base() -> Any:
    in_use = [package for package in _PACKAGES if package in sys.modules]
    for package in in_use or _PACKAGES:
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    raise OptionError(
        'lightning_callback needs lightning; run: pip install "torchlinop[lightning]"'
    )
