"""A model borrowed for an evaluation: put under fixed conditions, and given back bit-identical."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchlinop.errors import OptionError, TrainModeWarning
from torchlinop.formulas import WithFormulas, needs_formulas
from torchlinop.parameters import ParameterLayout
from torchlinop.random_state import preserved_random_state, reseed

Mode = Literal["eval", "train"]

_NORMS = (nn.modules.batchnorm._NormBase,)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)

# Two operators on one model, used from two threads, must not borrow it at the same time.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


class BorrowedModel:
    """Evaluates a model at given parameters, in a given mode, with its buffers as they were.

    At construction it copies the buffers and those trainable parameters that the layout leaves
    out, so that the matrix stays the same while the user goes on training. Frozen parameters
    are used where they are.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, mode: Mode, seed: int) -> None:
        if mode not in get_args(Mode):
            raise OptionError(f"unknown mode {mode!r}; choose one of {', '.join(get_args(Mode))}")
        self.module = unwrap(model)
        self.mode = mode
        self.seed = seed
        self.device = layout.slots[0].device
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        self._others = {name: parameters[name].detach().clone() for name in layout.filtered}
        self._buffers = {
            name: buffer.detach().clone()
            for name, buffer in self.module.named_buffers(remove_duplicate=False)
        }

    @contextmanager
    def borrowed(self, stream: int = 0, mode: Mode | None = None) -> Iterator[None]:
        """Hold the model: inside, ``place`` may be called, and all random numbers are pinned.

        ``stream`` numbers the batch: dropout masks (``mode="train"``) and noise drawn by the
        loss depend on (seed, stream) alone. ``mode`` replaces the operator's for once. The
        parameters placed last stay until the end, so that checkpointed segments are recomputed
        with them during a backward pass.
        """
        with ExitStack() as stack:
            stack.enter_context(_lock_of(self.module))
            stack.enter_context(_given_back(self.module))
            stack.enter_context(_twice_differentiable(self.module, self.device))
            stack.enter_context(preserved_random_state(self.device))
            key = np.random.SeedSequence(self.seed, spawn_key=(stream,)).generate_state(1)
            reseed(int(key[0]))
            self.module.train((mode or self.mode) == "train")
            yield

    def place(self, parameters: Mapping[str, Tensor]) -> nn.Module:
        """The model with these tensors as its parameters, and with fresh copies of its buffers."""
        for name, tensor in {**self._others, **parameters}.items():
            prefix, _, key = name.rpartition(".")
            self.module.get_submodule(prefix)._parameters[key] = tensor  # type: ignore[assignment]
        for name, buffer in self._buffers.items():
            prefix, _, key = name.rpartition(".")
            self.module.get_submodule(prefix)._buffers[key] = buffer.clone()
        return self.module

    def warn_if_training(self) -> None:
        """Warn when evaluation mode changes what the user's model computes."""
        modules = [m for m in self.module.modules() if m.training]
        dropouts = sum(isinstance(m, _DROPOUTS) and m.p > 0 for m in modules)
        norms = sum(isinstance(m, _NORMS) for m in modules)
        if self.mode == "eval" and dropouts + norms:
            warnings.warn(
                f"model.training is True; {dropouts} Dropout and {norms} BatchNorm modules were "
                'evaluated in eval mode. Pass mode="train" for the training-mode matrix.',
                TrainModeWarning,
                stacklevel=4,
            )


def _lock_of(module: nn.Module) -> threading.RLock:
    with _locks_guard:
        return _locks.setdefault(module, threading.RLock())


@contextmanager
def _given_back(model: nn.Module) -> Iterator[None]:
    """Restore every attribute, parameter and buffer slot, and mode of every module."""
    modules = list(model.modules())
    saved = [(dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in modules]
    try:
        yield
    finally:
        for module, (attributes, parameters, buffers) in zip(modules, saved, strict=True):
            for slots, values in (
                (module._parameters, parameters),
                (module._buffers, buffers),
                (module.__dict__, attributes),
            ):
                slots.clear()
                slots.update(values)  # type: ignore[arg-type]


@contextmanager
def _twice_differentiable(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Kernels that have second derivatives, in the precision the model was written in."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        # The fused attention kernels have no second derivative, the mathematical one has.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if needs_formulas(model):
            stack.enter_context(WithFormulas())
        if "torch._dynamo" in sys.modules:  # otherwise nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
