"""Which modules K-FAC has a rule for, and what it says of the others."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from torchlinop.errors import ParameterError
from torchlinop.operators.kfac.layers import (
    ChannelScaleLayer,
    ConvolutionLayer,
    Layer,
    LinearLayer,
    LookupLayer,
    ScaleLayer,
    TransposedLinearLayer,
)


def layer_of(name: str, module: nn.Module) -> Layer | None:
    """The module as a layer that K-FAC knows; None for all others."""
    return next((layer(name, module) for fits, layer in _LAYERS if fits(module)), None)


def why_no_rule(module: nn.Module, key: str) -> str:
    """For a parameter of a module, by its name there, to which no rule applies."""
    name = type(module).__name__
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        return f"{name} scales gradients by frequencies in the batch; build it without"
    return f"no K-FAC rule for {name if layer_of('', module) is None else f'{key} of {name}'}"


def refuse_unfit_modules(model: nn.Module) -> None:
    """Refuse sparse gradients, and weights that are no real numbers.

    Raises:
        ParameterError: there is such a module.
    """
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ParameterError(
                f"{type(module).__name__} {name or '(the model itself)'} has sparse gradients; "
                "build it with sparse=False"
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ParameterError(
                f"parameter {name!r} has dtype {parameter.dtype}: K-FAC needs floating-point "
                "weights; load the model without quantisation"
            )


def _is(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, classes)


def _named(*endings: str) -> Callable[[nn.Module], bool]:
    """Classes of other libraries, which need not be installed, are known by their names."""
    return lambda module: type(module).__name__.endswith(endings)


def _is_linear_lookup(module: nn.Module) -> bool:
    """Whether the output depends on the weight alone, not on which rows are looked up together."""
    plain = isinstance(module, nn.Embedding) and module.max_norm is None
    return plain and not module.scale_grad_by_freq


_Norms = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

_LAYERS: tuple[tuple[Callable[[nn.Module], bool], Callable[[str, nn.Module], Layer]], ...] = (
    (_is(nn.Linear), LinearLayer),
    (_is(nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvolutionLayer),
    (_is_linear_lookup, LookupLayer),
    (_is(*_Norms), ChannelScaleLayer),
    (_is(nn.LayerNorm, nn.RMSNorm), ScaleLayer),
    (_named("RMSNorm", "LayerNorm"), ScaleLayer),
    (_named("Conv1D"), TransposedLinearLayer),
)
