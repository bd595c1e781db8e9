"""Losses of Hugging Face language models, their own and in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from torchlinop.batches import describe
from torchlinop.errors import BatchError
from torchlinop.losses.cross_entropy import CrossEntropy
from torchlinop.losses.fused_cross_entropy import Backend
from torchlinop.losses.next_tokens import next_tokens
from torchlinop.weighting import IGNORED

TokenBatch = Mapping[str, Any]  # a dict, BatchEncoding or UserDict


def hf_lm_loss() -> Callable[[nn.Module, TokenBatch], Tensor]:
    """``model(**batch).loss``: what a causal model computes from the labels, in float32."""
    return _own_loss


def hf_seq2seq_loss() -> Callable[[nn.Module, TokenBatch], Tensor]:
    """``model(**batch).loss`` of an encoder-decoder, whose labels are not shifted."""
    return _own_loss


def hf_lm_forward() -> Callable[[nn.Module, TokenBatch], Tensor]:
    """``model(**batch).logits``: (B, T, V); labels stay out, so that no loss is computed.

    An encoder-decoder is given them: it makes the inputs of its decoder from labels.
    """
    return _logits


def hf_seq2seq_forward() -> Callable[[nn.Module, TokenBatch], Tensor]:
    """``model(**batch).logits`` of an encoder-decoder: (B, T, V) for labels (B, T)."""
    return _logits_given_labels


def hf_lm_loss_of_output(fused: Backend = "auto") -> CrossEntropy:
    """The loss of a causal model from its logits (B, T, V), averaged over unmasked next tokens.

    Equal to the model's own loss, in the precision of the logits, float32 at least. Labels of
    -100 are left out; without labels the tokens themselves are labels where they are attended
    to. ``fused`` names the way of Hessian products: "auto", "eager", "compile" or "triton".
    """
    return CrossEntropy(
        targets=shifted_labels, class_axis=-1, fused=fused, unit="unmasked next tokens"
    )


hf_lm_shifted_ce = hf_lm_loss_of_output  # named after what it is: shifted cross-entropy


def hf_seq2seq_loss_of_output(fused: Backend = "auto") -> CrossEntropy:
    """The loss of an encoder-decoder from its logits (B, T, V), averaged over unmasked labels.

    Label and logits of a position belong together; labels of -100 are left out. ``fused`` as for
    ``hf_lm_loss_of_output``.
    """
    return CrossEntropy(targets=labels_of, class_axis=-1, fused=fused)


def shifted_labels(batch: TokenBatch) -> Tensor:
    """The next tokens (B, T) of a batch, -100 where there is none to predict.

    Raises:
        BatchError: the batch has neither labels nor input_ids.
    """
    labels, tokens = _part(batch, "labels"), _part(batch, "input_ids")
    if labels is not None:
        return next_tokens(labels)
    if tokens is None:
        raise BatchError(
            f"expected a batch with labels or input_ids, got {describe(batch)}; "
            "pass what the tokenizer gives"
        )
    mask = _part(batch, "attention_mask")
    return next_tokens(tokens if mask is None else tokens.masked_fill(mask == 0, IGNORED))


def labels_of(batch: TokenBatch) -> Tensor:
    """The labels (B, T) of a batch.

    Raises:
        BatchError: it has none.
    """
    labels = _part(batch, "labels")
    if labels is None:
        raise BatchError(
            f"expected a batch with labels, got {describe(batch)}; put in the tokens to be "
            "predicted, with -100 at padding"
        )
    return labels


def _part(batch: TokenBatch, name: str) -> Tensor | None:
    return batch.get(name) if isinstance(batch, Mapping) else None


def _own_loss(model: nn.Module, batch: TokenBatch) -> Tensor:
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise BatchError(
            f"the model gave no loss for {describe(batch)}; put labels into the batch: the "
            "input_ids with -100 at padding"
        )
    return loss


def _logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    of_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if of_decoder and _part(batch, "decoder_input_ids") is None:
        return _logits_given_labels(model, batch)
    return _logits_given_labels(model, {key: batch[key] for key in batch if key != "labels"})


def _logits_given_labels(model: nn.Module, batch: TokenBatch) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits
