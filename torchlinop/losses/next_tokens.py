"""y_t = token_{t+1}: the targets of a causal language model, in the shape of its tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torchlinop.weighting import IGNORED


def next_tokens(labels: Tensor) -> Tensor:
    """Labels (*, T) shifted left, the last of every row masked.

    Targets are shifted, not logits, which then are neither cut nor copied.
    """
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)
