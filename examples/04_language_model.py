"""
Language models as they come
============================

Hessian and Gauss-Newton matrix of a GPT-2 and a Llama, with padded batches, tied heads and the
default attention; the block of the attention layers; and the dense answers beside them. Larger
models take the same lines.
"""

import torch
from scipy.sparse.linalg import eigsh
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, logging

from torchlinop import (
    GGNOperator,
    HessianOperator,
    KFACOperator,
    as_linear_operator,
    match_regex,
)
from torchlinop.losses import hf_lm_forward, hf_lm_loss, hf_lm_loss_of_output
from torchlinop.testing.oracles import dense_ggn, dense_hessian

logging.set_verbosity_error()  # a vocabulary of 11 lacks the tokens that configs name
torch.manual_seed(0)
V, D, T = 11, 8, 12  # vocabulary, width, context
gpt2 = GPT2Config(vocab_size=V, n_positions=T, n_embd=D, n_layer=1, n_head=2)
llama = LlamaConfig(
    vocab_size=V, max_position_embeddings=T, hidden_size=D, intermediate_size=2 * D,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip


def padded(*lengths):
    """What a tokenizer gives: ids, the attention mask, and labels with -100 at padding."""
    ids = torch.randint(V, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


batches = [padded(7, 5, 3), padded(9, 4), padded(6)]  # ragged in every way


def largest(operator):
    A = as_linear_operator(operator)
    return torch.tensor(eigsh(A, k=3, which="LA", return_eigenvectors=False)).flip(0)


# %%
# The three matrices of one model, and the same by autograd alone.
def compare(model):
    loss = (hf_lm_forward(), hf_lm_loss_of_output())
    operators = {
        "Hessian": HessianOperator(model, batches, hf_lm_loss()),  # of the model's own loss
        "GGN": GGNOperator(model, batches, *loss),
        # The filter sees names: this is the diagonal block of the attention layers.
        "GGN, attention": GGNOperator(model, batches, *loss, param_filter=match_regex("attn")),
    }
    print(f"\n{operators['GGN']}\n{KFACOperator(model, batches, *loss).coverage.summary}")
    found = {name: largest(operator) for name, operator in operators.items()}

    # The same by autograd alone: the logits and targets of all next tokens that are no padding.
    counted = [batch["labels"][:, 1:] != -100 for batch in batches]
    targets = torch.cat([b["labels"][:, 1:][c] for b, c in zip(batches, counted, strict=True)])

    def logits():
        every = [model(b["input_ids"], attention_mask=b["attention_mask"]).logits for b in batches]
        return torch.cat([f[:, :-1][c] for f, c in zip(every, counted, strict=True)])

    def of(logits):
        return cross_entropy(logits, targets)

    named = dict(model.named_parameters())
    H = dense_hessian(lambda: of(logits()), [*named.values()], rows_at_once=64)
    G = dense_ggn(of, logits, [*named.values()])
    rows = torch.cat([torch.full((p.numel(),), "attn" in name) for name, p in named.items()])
    dense = {"Hessian": H, "GGN": G, "GGN, attention": G[rows][:, rows]}
    print(f"{'largest eigenvalues':36}for comparison: the dense answer")
    both = {}
    for name, matrix in dense.items():
        both[name] = found[name], torch.linalg.eigvalsh(matrix)[-3:].flip(0)
        columns = ("".join(f"{x:9.4f}" for x in values.tolist()) for values in both[name])
        print(f"{name:17}" + "    ".join(columns))
    return both


# %%
of_gpt2 = compare(GPT2LMHeadModel(gpt2).eval())

# %%
of_llama = compare(LlamaForCausalLM(llama).eval())

# %%
# The picture, with ``pip install "torchlinop[plot]"``:
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharex=True)
for ax, title, both in zip(axes, ("GPT-2", "Llama"), (of_gpt2, of_llama), strict=True):
    for name, (values, exact) in both.items():
        (line,) = ax.plot((1, 2, 3), exact, "o", mfc="none", ms=10)
        ax.plot((1, 2, 3), values, "x", color=line.get_color(), label=name)
    ax.set(title=title, xlabel="i", ylabel="eigenvalue (rings: dense)", xticks=(1, 2, 3))
    ax.legend()
plt.show()
