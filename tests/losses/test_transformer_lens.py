"""The losses of a TransformerLens bridge around a GPT-2 with random weights, without downloads."""

import warnings

import pytest
import torch

from torchlinop import GGNOperator, HessianOperator
from torchlinop.losses import tlens_forward, tlens_loss, tlens_loss_of_output
from torchlinop.testing.oracles import dense_ggn, dense_hessian

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that it imports


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = pytest.importorskip("transformer_lens")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    directory = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lens.TransformerBridge.boot_transformers(
            model_name=str(directory), hf_model=model, device="cpu"
        ).eval()


def tokens():
    torch.manual_seed(1)
    return torch.randint(0, 7, (3, 6))


def used(model, loss):
    """Parameters that influence the loss: a bridge keeps a second, unused copy of Q, K and V."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    names = {id(p) for p, g in zip(parameters, gradients, strict=True) if g is not None}
    return lambda name, parameter: id(parameter) in names


@pytest.mark.parametrize("batch", [tokens(), {"tokens": tokens()}], ids=["tensor", "mapping"])
def test_the_loss_of_logits_is_the_loss_of_the_bridge(bridge, batch):
    loss = tlens_loss()(bridge, batch)
    of_output = tlens_loss_of_output()(tlens_forward()(bridge, batch), batch)
    torch.testing.assert_close(of_output, loss, rtol=1e-5, atol=0)


def test_hessian_and_ggn_of_a_bridge_are_the_dense_ones(bridge):
    batch = tokens()
    chosen = used(bridge, lambda: tlens_loss()(bridge, batch))
    parameters = [p for n, p in bridge.named_parameters() if p.requires_grad and chosen(n, p)]
    H = HessianOperator(bridge, [batch[:2], batch[2:]], tlens_loss(), param_filter=chosen)
    dense = dense_hessian(lambda: tlens_loss()(bridge, batch), parameters, rows_at_once=64)
    torch.testing.assert_close(H.to_dense(), dense, rtol=0, atol=1e-5 * float(dense.abs().max()))
    G = GGNOperator(
        bridge, [batch[:2], batch[2:]], tlens_forward(), tlens_loss_of_output(), param_filter=chosen
    )
    loss = tlens_loss_of_output()
    dense = dense_ggn(lambda f: loss(f, batch), lambda: tlens_forward()(bridge, batch), parameters)
    torch.testing.assert_close(G.to_dense(), dense, rtol=0, atol=1e-5 * float(dense.abs().max()))
