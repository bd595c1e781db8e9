"""Language models' losses: their own, and the same in closed form from logits."""

import pickle
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlinop import GGNOperator
from torchlinop.errors import BatchError
from torchlinop.losses import (
    hf_lm_forward,
    hf_lm_loss,
    hf_lm_loss_of_output,
    hf_lm_shifted_ce,
    hf_seq2seq_forward,
    hf_seq2seq_loss,
    hf_seq2seq_loss_of_output,
    tlens_forward,
    tlens_loss,
    tlens_loss_of_output,
)
from torchlinop.losses.huggingface import shifted_labels
from torchlinop.testing import gallery
from torchlinop.testing.oracles import dense_ggn

transformers = pytest.importorskip("transformers")


TOKENS = torch.randint(0, 7, (3, 5))


def as_encoding(batch):
    return transformers.BatchEncoding(batch)


@pytest.mark.parametrize("form", [dict, as_encoding, UserDict])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_loss_of_logits_is_the_model_s_own(name, form):
    p = getattr(gallery, name)()
    p.model.requires_grad_(False)
    batch = form(p.full_batch)
    logits = hf_lm_forward()(p.model, batch)
    ours, own = hf_lm_loss_of_output()(logits, batch), hf_lm_loss()(p.model, batch)
    assert float(ours) == pytest.approx(float(p.full_loss()), rel=1e-12)
    assert float(ours) == pytest.approx(float(own), rel=1e-6)  # which is in float32


def test_weights_of_ragged_batches_give_the_loss_of_the_whole():
    p = gallery.gpt2()
    loss, forward = hf_lm_loss_of_output(), hf_lm_forward()
    counts = [loss.weighting.count(batch) for batch in p.batches]
    p.model.requires_grad_(False)
    losses = [float(loss(forward(p.model, batch), batch)) for batch in p.batches]
    mean = sum(c * v for c, v in zip(counts, losses, strict=True)) / sum(counts)
    assert counts == [13, 6, 2]  # next tokens in rows of 7, 4, 5, then 2, 6, then 3
    assert mean == pytest.approx(float(p.full_loss()), rel=1e-12)


def test_products_and_terms_are_those_of_the_shifted_loss():
    p = gallery.gpt2()
    batch = p.full_batch
    logits = hf_lm_forward()(p.model, batch).detach().requires_grad_()
    labels = batch["labels"][:, 1:].flatten()
    value = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    u = torch.randn_like(logits)
    (Hu,) = torch.autograd.grad(gradient, logits, u)
    loss = hf_lm_loss_of_output(fused="eager")
    terms = loss.terms(logits, batch)
    assert float((loss.hvp(logits, batch, u) - Hu).abs().max() / Hu.abs().max()) < 1e-12
    assert torch.allclose(terms.weights * terms.gradients, gradient, rtol=1e-12, atol=1e-16)
    assert hf_lm_shifted_ce is hf_lm_loss_of_output


def test_tokens_that_are_attended_to_are_labels_where_there_are_none():
    p = gallery.gpt2()
    without = {k: v for k, v in p.full_batch.items() if k != "labels"}
    assert torch.equal(shifted_labels(without), shifted_labels(p.full_batch))
    tokens = {"input_ids": torch.tensor([[1, 2, 3]])}
    assert torch.equal(shifted_labels(tokens), torch.tensor([[2, 3, -100]]))


def encoder_decoder():
    config = transformers.T5Config(
        vocab_size=9, d_model=4, d_kv=2, d_ff=5, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    batch = {
        "input_ids": torch.randint(1, 9, (2, 4)),
        "labels": torch.tensor([[1, 2, -100], [3, 4, 5]]),
    }
    return model, batch


def test_the_loss_of_an_encoder_decoder_is_its_own():
    model, batch = encoder_decoder()
    expected = F.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten())
    assert float(hf_seq2seq_loss()(model, batch)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("forward", [hf_seq2seq_forward, hf_lm_forward])
def test_the_loss_of_logits_is_that_of_the_encoder_decoder(forward):
    model, batch = encoder_decoder()
    loss = hf_seq2seq_loss_of_output()
    value = loss(forward()(model, batch), batch)
    assert float(value) == pytest.approx(float(hf_seq2seq_loss()(model, batch)), rel=1e-6)
    assert loss.weighting.count(batch) == 5


def test_inputs_of_the_decoder_take_the_place_of_labels():
    model, batch = encoder_decoder()
    shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    given = {**batch, "labels": torch.zeros(2, 9).long(), "decoder_input_ids": shifted}
    expected = hf_seq2seq_forward()(model, batch)
    assert torch.equal(hf_lm_forward()(model, given), expected)


def test_the_ggn_of_an_encoder_decoder_is_the_dense_one():
    model, batch = encoder_decoder()
    parts = [{name: part[cut] for name, part in batch.items()} for cut in (slice(1), slice(1, 2))]
    model.requires_grad_(True)
    G = GGNOperator(model, parts, hf_seq2seq_forward(), hf_seq2seq_loss_of_output())
    dense = dense_ggn(
        lambda f: F.cross_entropy(f.flatten(0, 1), batch["labels"].flatten()),
        lambda: model(**batch).logits,
        list(model.parameters()),
    )
    torch.testing.assert_close(G.to_dense(), dense, rtol=0, atol=1e-5 * float(dense.abs().max()))


@pytest.mark.parametrize("batch", [{"labels": None}, TOKENS], ids=type)
def test_a_batch_without_labels_of_a_decoder_is_refused(batch):
    with pytest.raises(BatchError, match=r"expected a batch with labels, got a .*; put in the"):
        hf_seq2seq_loss_of_output().weighting.count(batch)


def test_a_batch_without_labels_has_no_own_loss():
    p = gallery.gpt2()
    with pytest.raises(BatchError, match=r"gave no loss for a dict with keys .*; put labels into"):
        hf_lm_loss()(p.model, {"input_ids": p.full_batch["input_ids"]})


WITHOUT = {
    "no tokens": {"pixels": torch.ones(2)},
    "a tensor": torch.ones(2, 3).long(),
    "labels of None": {"inputs_embeds": torch.ones(2, 3, 4), "labels": None},
}


@pytest.mark.parametrize("batch", WITHOUT.values(), ids=WITHOUT)
def test_a_batch_without_tokens_is_refused(batch):
    message = "expected a batch with labels or input_ids, got a .*; pass what the tokenizer gives"
    with pytest.raises(BatchError, match=message):
        shifted_labels(batch)


class Hooked(nn.Module):
    """A bigram model called as those of TransformerLens are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 7, dtype=torch.float64)

    def forward(self, tokens, return_type="logits"):
        logits = self.embed(tokens)
        if return_type == "logits":
            return logits
        assert return_type == "loss"
        log_p = logits[:, :-1].log_softmax(-1)
        return -log_p.gather(-1, tokens[:, 1:, None]).mean()


@pytest.mark.parametrize("batch", [TOKENS, {"tokens": TOKENS}, {"input_ids": TOKENS}], ids=type)
def test_the_loss_of_transformer_lens_logits_is_the_model_s_own(batch):
    model = Hooked().requires_grad_(False)
    ours = tlens_loss_of_output()(tlens_forward()(model, batch), batch)
    assert float(ours) == pytest.approx(float(tlens_loss()(model, batch)), rel=1e-12)
    assert tlens_loss_of_output(fused="eager").weighting.count(batch) == 12


def test_a_batch_without_token_ids_is_refused():
    with pytest.raises(BatchError, match="a mapping with tokens, got a list of 1 parts; pass"):
        tlens_loss()(Hooked(), [TOKENS])


LOSSES = (hf_lm_loss, hf_lm_forward, hf_seq2seq_loss, hf_seq2seq_forward, tlens_loss, tlens_forward)


@pytest.mark.parametrize("make", LOSSES)
def test_functions_of_language_models_can_be_pickled(make):
    assert pickle.loads(pickle.dumps(make())) is make()


@pytest.mark.parametrize(
    ("make", "unit"),
    [
        (hf_lm_loss_of_output, "unmasked next tokens"),
        (hf_seq2seq_loss_of_output, "unmasked labels"),
        (tlens_loss_of_output, "next tokens"),
    ],
)
def test_losses_of_logits_can_be_pickled_and_name_what_they_count(make, unit):
    loss = pickle.loads(pickle.dumps(make()))
    logits, batch = torch.randn(3, 5, 7), {"input_ids": TOKENS, "labels": TOKENS}
    assert torch.equal(loss(logits, batch), make()(logits, batch))
    assert loss.weighting.unit == unit
