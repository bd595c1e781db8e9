"""Losses of TransformerLens models, their own and in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from torchlinop.batches import Batch, describe
from torchlinop.errors import BatchError
from torchlinop.losses.cross_entropy import CrossEntropy
from torchlinop.losses.fused_cross_entropy import Backend
from torchlinop.losses.next_tokens import next_tokens


def tlens_loss() -> Callable[[nn.Module, Batch], Tensor]:
    """``model(tokens, return_type="loss")``: the mean over all next tokens."""
    return _own_loss


def tlens_forward() -> Callable[[nn.Module, Batch], Tensor]:
    """``model(tokens, return_type="logits")``: (B, T, V)."""
    return _logits


def tlens_loss_of_output(fused: Backend = "auto") -> CrossEntropy:
    """The mean over all next tokens from the logits (B, T, V), without padding.

    ``fused`` names the way of Hessian products: "auto", "eager", "compile" or "triton".
    """
    return CrossEntropy(targets=_targets, class_axis=-1, fused=fused, unit="next tokens")


def tokens_of(batch: Batch) -> Tensor:
    """The token ids (B, T): the batch itself, or its part ``tokens`` or ``input_ids``.

    Raises:
        BatchError: there are none.
    """
    parts = {"tokens": batch} if isinstance(batch, Tensor) else batch
    names = ("tokens", "input_ids")
    found = [parts[n] for n in names if n in parts] if isinstance(parts, Mapping) else []
    if not found:
        raise BatchError(
            f"expected a tensor of token ids, or a mapping with tokens, got {describe(batch)}; "
            "pass the ids alone"
        )
    tokens: Tensor = found[0]
    return tokens


# Functions of the module, not lambdas, so that losses can be pickled.
def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(tokens_of(batch), return_type="loss")
    return loss


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(tokens_of(batch), return_type="logits")
    return logits


def _targets(batch: Batch) -> Tensor:
    return next_tokens(tokens_of(batch))
