"""A model borrowed for an evaluation: put under fixed conditions, and given back bit-identical."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from torchlinop.articles import kind_of
from torchlinop.choices import refuse_unknown
from torchlinop.errors import OptionError, TrainModeWarning, warn_caller
from torchlinop.formulas import WithFormulas, needs_formulas
from torchlinop.parameters import ParameterLayout
from torchlinop.random_state import preserved_random_state, reseed

Mode = Literal["eval", "train"]

# Attention kernels, compiler stance and random states belong to the process, and models may
# share modules: one evaluation at a time.
borrowing = threading.RLock()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Raises:
        OptionError: it is no module that runs in Python.
    """
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        raise OptionError(
            f"expected a torch.nn.Module that runs in Python, got {kind_of(model)}; "
            "give the operator the model from before torch.jit.script or trace"
        )
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@dataclass
class _Loan:
    """The conditions of evaluations, and how the modules are given back."""

    key: int  # of their random numbers
    training: bool
    restore: Callable[[], None]
    used: bool = False  # whether there was an evaluation


class BorrowedModel:
    """Evaluates a model at given parameters, in a given mode, with its buffers as they were.

    At construction it copies the buffers, other tensors that are attributes of modules, and those
    trainable parameters that the layout leaves out, so that the matrix stays the same while the
    user goes on training. Frozen parameters are used where they are.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, mode: Mode, seed: int) -> None:
        refuse_unknown_mode(mode)
        self.module = unwrap(model)
        refuse_renormalised_embeddings(self.module)
        self.mode = mode
        self.seed = seed
        self.device = layout.slots[0].device
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        trained = {p.data_ptr() for p in self.module.parameters() if p.requires_grad}
        shared = [name for name in layout.frozen if parameters[name].data_ptr() in trained]
        self._others = {n: parameters[n].detach().clone() for n in (*layout.filtered, *shared)}
        self._loan: _Loan | None = None
        self._buffers = {
            name: buffer.detach().clone()
            for name, buffer in self.module.named_buffers(remove_duplicate=False)
        }
        self._tensors = [
            (module, key, tensor.detach().clone())
            for module in self.module.modules()
            for key, tensor in vars(module).items()
            if isinstance(tensor, Tensor) and not tensor.requires_grad
        ]

    @contextmanager
    def borrowed(self, stream: int = 0, mode: Mode | None = None) -> Iterator[None]:
        """Hold the model: inside, ``place`` may be called, and all random numbers are pinned.

        ``stream`` numbers the batch: dropout masks (``mode="train"``) and noise drawn by the
        loss depend on (seed, stream) alone. ``mode`` replaces the operator's for once. The
        parameters placed last stay until the end, so that checkpointed segments are recomputed
        with them during a backward pass.
        """
        with ExitStack() as stack:
            stack.enter_context(borrowing)
            restore = stack.enter_context(given_back(self.module))
            stack.enter_context(twice_differentiable(self.module, self.device))
            stack.enter_context(preserved_random_state(self.device))
            stack.enter_context(nothing_cached())
            key = np.random.SeedSequence(self.seed, spawn_key=(stream,)).generate_state(1)
            outer = self._loan
            self._loan = _Loan(int(key[0]), (mode or self.mode) == "train", restore)
            self._enter(self._loan)
            try:
                yield
            finally:
                self._loan = outer

    def _enter(self, loan: _Loan) -> None:
        self.module.train(loan.training)
        silence_gradient_hooks(self.module)
        for embedding in embeddings(self.module):
            embedding.sparse = False  # gradients are dense vectors here

    def place(self, parameters: Mapping[str, Tensor]) -> nn.Module:
        """The model with these tensors as its parameters, and with fresh copies of its buffers.

        Every evaluation draws the same random numbers, and finds the modules as the first one did:
        differences are taken of one function.
        """
        assert self._loan is not None  # borrowed
        if self._loan.used:
            self._loan.restore()
            self._enter(self._loan)
        self._loan.used = True
        reseed(self._loan.key, self.device)
        for name, tensor in {**self._others, **parameters}.items():
            prefix, _, key = name.rpartition(".")
            self.module.get_submodule(prefix)._parameters[key] = tensor  # type: ignore[assignment]
        for name, buffer in self._buffers.items():
            prefix, _, key = name.rpartition(".")
            self.module.get_submodule(prefix)._buffers[key] = buffer.clone()
        for module, key, tensor in self._tensors:
            vars(module)[key] = tensor.clone()
        return self.module

    def held(self) -> dict[str, Tensor]:
        """What the model is evaluated with besides θ: other parameters, and buffers, by name."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        return {**parameters, **self._others, **self._buffers}

    def describe(self) -> str:
        """What depends on the mode, and the kernels chosen."""
        dropouts, norms = _moody(list(self.module.modules()))
        return (
            f"{dropouts} with Dropout and {norms} with running statistics, in {self.mode} mode; "
            "attention by its mathematical kernel, autocast off"
        )

    def warn_if_training(self) -> None:
        """Warn when evaluation mode changes what the user's model computes."""
        warn_if_training(self.module, self.mode)


def refuse_unknown_mode(mode: str) -> None:
    """Raise OptionError for a mode that there is not."""
    refuse_unknown("mode", mode, get_args(Mode))


def warn_if_training(module: nn.Module, mode: Mode) -> None:
    """Warn when evaluation mode changes what the user's model computes."""
    dropouts, norms = _moody([m for m in module.modules() if m.training])
    if mode == "eval" and dropouts + norms:
        warn_caller(
            f"model.training is True; {dropouts} Dropout and {norms} BatchNorm modules were "
            'evaluated in eval mode. Pass mode="train" for the training-mode matrix.',
            TrainModeWarning,
        )


def embeddings(model: nn.Module) -> Iterator[nn.Embedding | nn.EmbeddingBag]:
    """All lookup tables of a model."""
    return (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))


def refuse_renormalised_embeddings(model: nn.Module) -> None:
    """Raise OptionError for a table whose forward pass changes its weight."""
    if any(embedding.max_norm is not None for embedding in embeddings(model)):
        raise OptionError(
            "an Embedding with max_norm changes its own weight as it is used, so that the loss is "
            "no function of the parameters; renormalise the weight once and set max_norm=None"
        )


def silence_gradient_hooks(model: nn.Module) -> None:
    """Until the model is ``given_back``: what hooks make of gradients is no derivative."""
    for module in model.modules():
        module._backward_hooks = OrderedDict()
        module._backward_pre_hooks = OrderedDict()


def _moody(modules: Sequence[nn.Module]) -> tuple[int, int]:
    """How many of the modules drop at random, and how many use batch statistics, in train mode."""
    return (
        sum(_dropout_of(m) > 0 for m in modules),
        sum(bool(getattr(m, "track_running_stats", False)) for m in modules),
    )


def _dropout_of(module: nn.Module) -> float:
    """The probability with which a module drops what passes through it."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    rate = getattr(module, "dropout", 0.0)  # of an RNN or an attention
    return rate if isinstance(rate, float) else 0.0


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off, on the CPU and on ``device``."""
    with ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def nothing_cached() -> Iterator[None]:
    """What ``parametrize.cached()`` keeps would be of the parameters of another evaluation."""
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


@contextmanager
def given_back(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore the attributes of every module, and what its lists, sets and dicts hold.

    Modes, parameters, buffers, submodules and hooks are such attributes. Lists within lists are
    restored too; what other objects hold is not. Gives a function that does so before the end.
    """
    saved = [
        (attributes, dict(attributes), [(c, _content(c)) for c in _containers(attributes)])
        for attributes in map(vars, model.modules())
    ]

    def restore() -> None:
        for attributes, values, containers in saved:
            attributes.clear()
            attributes.update(values)
            for container, content in containers:
                container.clear()
                fill = container.extend if isinstance(container, list) else container.update
                fill(content)

    try:
        yield restore
    finally:
        restore()


def _containers(attributes: dict[str, Any]) -> list[Any]:
    """The lists, sets and dicts among the values, and among what these hold, each once."""
    found: list[Any] = [attributes]
    known = {id(attributes)}
    for container in found:  # which grows on the way
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, dict | set | list) and id(value) not in known:
                known.add(id(value))
                found.append(value)
    return found[1:]


def _content(container: Any) -> list[Any]:
    """What fills it again: a module has a dozen containers, most of them empty, and copies cost."""
    return list(container.items() if isinstance(container, dict) else container)


@contextmanager
def twice_differentiable(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Kernels that have second derivatives, in the precision the model was written in."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(full_precision(device))
        # The fused attention kernels have no second derivative, the mathematical one has.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if needs_formulas(model):
            stack.enter_context(WithFormulas())
        if "torch._dynamo" in sys.modules:  # otherwise nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
