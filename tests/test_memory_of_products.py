"""A product with a large vocabulary holds at most four tensors of the size of the logits."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchlinop import EmpiricalFisherOperator, FisherOperator, GGNOperator

TOKENS, VOCABULARY = 256, 4000  # enough for the loss to work on pieces, as it does on larger ones
LOGITS = 4 * TOKENS * VOCABULARY  # bytes, in float32


class LiveLogits(TorchDispatchMode):
    """Notes how many bytes lie in live storages of half the logits or more, at the most.

    An upper bound: under such a mode autograd adds up gradients out of place.
    """

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= LOGITS / 2:
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.storages = {r: nbytes for r, nbytes in self.storages.items() if not r.expired()}
        self.peak = max(self.peak, self.live)
        return outputs

    @property
    def live(self):
        return sum(self.storages.values())


def test_tensors_are_counted_while_they_are_alive():
    with LiveLogits() as logits:
        a = torch.zeros(TOKENS, VOCABULARY)
        b = a + (a + 1)  # a, the sum in between, and b
        del a
        torch.zeros(VOCABULARY)
    assert (logits.peak / LOGITS, logits.live / LOGITS) == (3, 1)
    assert b.shape == (TOKENS, VOCABULARY)


def language_model():
    """Tokens (N,) to logits (N, vocabulary), and a batch."""
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, VOCABULARY))
    return model, (torch.randint(50, (TOKENS,)), torch.randint(VOCABULARY, (TOKENS,)))


def forward(model, batch):
    return model(batch[0])


@pytest.mark.parametrize("operator", [GGNOperator, FisherOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("linearization", ["keep", "rebuild"])
def test_a_product_holds_at_most_four_tensors_of_the_size_of_the_logits(operator, linearization):
    model, batch = language_model()
    with LiveLogits() as logits:  # from the start, so that what is kept is counted too
        A = operator(model, [batch], forward, nn.CrossEntropyLoss(), linearization=linearization)
        v = torch.randn(A.size)
        A @ v
        logits.peak = 0
        A @ v
    assert 1 <= logits.peak / LOGITS <= 4
