"""Raw autograd failures, told in the words of the person whose model it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from torch import Tensor, nn
from torch.autograd.graph import Node

from torchlinop.errors import CheckpointError, DoubleBackwardError, ParameterError
from torchlinop.graphs import ancestors

_NO_DERIVATIVE = re.compile(r"derivative for '?((?:aten::)?\w+)'? is not implemented")
_COMPILED = "does not currently support double backward"


@contextmanager
def second_derivatives_explained(
    model: nn.Module, evaluate: Callable[[], Tensor]
) -> Iterator[None]:
    """Turn what autograd says about a missing second derivative into what to do about it.

    ``evaluate`` computes the loss once more, to find the module at fault.

    Raises:
        DoubleBackwardError: an operation has no second derivative.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        operation = _NO_DERIVATIVE.search(text)
        if operation:
            node = _node_name(operation[1])
            raise DoubleBackwardError(
                f'"{operation[1]}"{_module_of(model, evaluate, node)} has no second derivative. '
                f'{_instead_of(node)}, or use method="finite_difference"'
            ) from error
        if "sparse tensors" in text:
            raise DoubleBackwardError(
                "an operation gives a sparse gradient, but derivatives are dense vectors here; "
                "call it with sparse=False"
            ) from error
        if "Such functions do not allow the output views to be modified inplace" in text:
            raise changed_parameters() from error
        if _COMPILED in text:
            raise DoubleBackwardError(
                "a compiled function was differentiated twice, which torch.compile does not "
                "support. Give the operator the model and loss from before torch.compile"
            ) from error
        raise


def changed_parameters() -> ParameterError:
    """The error for a model whose evaluation moves the point at which it is evaluated."""
    return ParameterError(
        "the model changes its own parameters as it is evaluated, so that the loss is no function "
        "of them; clamp or normalise them once, before the operator is built"
    )


def refuse_silent_gaps(loss: Tensor, own: Mapping[Tensor, str], *, twice: bool) -> None:
    """Refuse graphs of which autograd would give wrong derivatives without an error.

    Parameters reached past the model (``own``, with their names) would count as constant.

    A reentrantly checkpointed segment is opaque: parameters used inside seem to have no
    influence. A backward marked @once_differentiable counts as constant (if ``twice``) where
    its incoming gradient does not depend on the parameters.
    """
    bypassed: list[str] = []
    for node in ancestors([loss.grad_fn]):
        variable = getattr(node, "variable", None)  # of the leaves
        if variable is not None and variable in own:
            bypassed.append(own[variable])
        if node.name().startswith("CheckpointFunction"):
            refuse_reentrance()
        function = getattr(node, "_forward_cls", None)
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if twice and code is not None and code.co_qualname.startswith("once_differentiable"):
            name = node.name().removesuffix("Backward")
            raise DoubleBackwardError(
                f"the autograd.Function {name} is marked @once_differentiable, so it has no second "
                "derivative. Write its backward with torch operations, or use "
                'method="finite_difference"'
            )

    if bypassed:
        raise ParameterError(
            f"the loss uses {', '.join(sorted(bypassed))} directly, not through the model it is "
            "given; take parameters from loss_fn's own argument, as model.parameters(), and leave "
            "parametrize.cached() first"
        )


def refuse_reentrance() -> NoReturn:
    """Raise CheckpointError."""
    raise CheckpointError(
        "the model uses reentrant checkpointing, which cannot be differentiated twice. "
        "Call checkpoint(..., use_reentrant=False), or with Hugging Face "
        'model.gradient_checkpointing_enable({"use_reentrant": False})'
    )


def _node_name(operation: str) -> str:
    """``aten::_flash_attention_backward`` -> ``flashattention``, as forward nodes are named."""
    name = operation.removeprefix("aten::").removesuffix("_backward")
    return name.replace("_", "").lower()


def _instead_of(node_name: str) -> str:
    if "attention" in node_name:
        return 'Load the model with attn_implementation="eager"'
    return "Write it as a formula of other operations"


def _module_of(model: nn.Module, evaluate: Callable[[], Tensor], node_name: str) -> str:
    """`` (module a.b.c)`` for the innermost module whose forward made such a node, or nothing."""
    claimed: set[Node] = set()
    culprits: list[str] = []

    def claim(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            made = ancestors([first.grad_fn] if isinstance(first, Tensor) else [], claimed)
            if any(node.name().lower().startswith(node_name) for node in list(made)):
                culprits.append(name)

        return hook

    handles = [m.register_forward_hook(claim(name)) for name, m in model.named_modules()]
    try:
        evaluate()
    finally:
        for handle in handles:
            handle.remove()
    return f" (module {culprits[0] or 'the model itself'})" if culprits else ""
