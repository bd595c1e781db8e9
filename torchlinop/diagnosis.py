"""Raw autograd failures, told in the words of the person whose model it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import Node

from torchlinop.errors import CheckpointError, DoubleBackwardError

_NO_DERIVATIVE = re.compile(r"derivative for (aten::\w+) is not implemented")
_ONCE = "marked with @once_differentiable"
_REENTRANT = "Checkpointing is not compatible with"
_COMPILED = "does not currently support double backward"


@contextmanager
def second_derivatives_explained(
    model: nn.Module, evaluate: Callable[[], Tensor]
) -> Iterator[None]:
    """Turn what autograd says about a missing second derivative into what to do about it.

    ``evaluate`` computes the loss once more, to find the module at fault.

    Raises:
        CheckpointError: a segment uses reentrant checkpointing.
        DoubleBackwardError: an operation has no second derivative.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        operation = _NO_DERIVATIVE.search(text)
        if _REENTRANT in text:
            raise CheckpointError(
                "the model uses reentrant checkpointing, which cannot be differentiated twice. "
                "Call checkpoint(..., use_reentrant=False), or with Hugging Face "
                'model.gradient_checkpointing_enable({"use_reentrant": False})'
            ) from error
        if operation:
            node = _node_name(operation[1])
            raise DoubleBackwardError(
                f'"{operation[1]}"{_module_of(model, evaluate, node)} has no second derivative. '
                'Load the model with attn_implementation="eager" if it is an attention kernel, '
                'or use method="finite_difference"'
            ) from error
        if _ONCE in text:
            raise DoubleBackwardError(
                "an autograd.Function of the model is marked @once_differentiable, so it has no "
                "second derivative. Write its backward with torch operations, or use "
                'method="finite_difference"'
            ) from error
        if _COMPILED in text:
            raise DoubleBackwardError(
                "a compiled function was differentiated twice, which torch.compile does not "
                "support. Give the operator the model and loss from before torch.compile"
            ) from error
        raise


def _node_name(operation: str) -> str:
    """``aten::_flash_attention_backward`` -> ``flashattention``, as forward nodes are named."""
    name = operation.removeprefix("aten::").removesuffix("_backward")
    return name.replace("_", "").lower()


def _module_of(model: nn.Module, evaluate: Callable[[], Tensor], node_name: str) -> str:
    """`` (module a.b.c)`` for the innermost module whose forward made such a node, or nothing."""
    claimed: set[Node] = set()
    culprits: list[str] = []

    def claim(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            stack: list[Node | None] = [first.grad_fn] if isinstance(first, Tensor) else []
            while stack:
                node = stack.pop()
                if node is None or node in claimed:
                    continue
                claimed.add(node)
                if node.name().lower().startswith(node_name):
                    culprits.append(name)
                stack.extend(parent for parent, _ in node.next_functions)

        return hook

    handles = [m.register_forward_hook(claim(name)) for name, m in model.named_modules()]
    try:
        evaluate()
    finally:
        for handle in handles:
            handle.remove()
    return f" (module {culprits[0] or 'the model itself'})" if culprits else ""
