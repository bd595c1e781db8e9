"""The patches of its input that a convolution multiplies with its weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """What a convolution multiplies with its weight: (R, positions, groups, d_in) for (R, C, ...).

    d_in runs over the channels of a group and the places of the kernel, as the weight does.
    """
    axes = len(module.kernel_size)
    x = _padded(module, x)
    for i, (kernel, step, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, step)[..., ::dilation]
    places, kernel_axes = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
    x = x.permute(0, *places, 1, *kernel_axes)  # (R, *places, C, *kernel)
    rows: Tensor = x.flatten(1, axes).unflatten(2, (module.groups, -1)).flatten(3)
    return rows


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    if module.padding == "valid":
        return x
    widths: list[int] = []
    for i in reversed(range(len(module.kernel_size))):  # F.pad begins with the last axis
        if module.padding == "same":
            total = module.dilation[i] * (module.kernel_size[i] - 1)
            widths += [total // 2, total - total // 2]
        else:
            widths += [int(module.padding[i])] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded: Tensor = F.pad(x, widths, mode)
    return padded
