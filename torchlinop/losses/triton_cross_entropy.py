"""H u = w p (u − ⟨p, u⟩) in two sweeps: one finds max, Σ eˡ and Σ eˡ u, the other writes.

The maximum is not known before the first sweep has ended: both sums are rescaled whenever it
grows (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _sweeps(  # type: ignore[no-untyped-def] # noqa: PLR0917
    logits, u, out, weights,
    rows, V, n1, n2,
    logits_0, logits_1, logits_2, logits_v,
    u_0, u_1, u_2, u_v,
    out_0, out_1, out_2, out_v,
    weights_0, weights_1, weights_2,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows, BLOCK classes at a time, in the precision REAL."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i0, i1, i2 = row // (n1 * n2), row // n2 % n1, row % n2
    inside = row < rows
    w = tl.load(weights + i0 * weights_0 + i1 * weights_1 + i2 * weights_2, inside, 0).to(REAL)
    counts = w != 0
    logits += (i0 * logits_0 + i1 * logits_1 + i2 * logits_2)[:, None]
    u += (i0 * u_0 + i1 * u_1 + i2 * u_2)[:, None]
    out += (i0 * out_0 + i1 * out_1 + i2 * out_2)[:, None]
    column = tl.arange(0, BLOCK).to(tl.int64)[None, :]

    m = tl.full([ROWS], float("-inf"), REAL)
    z = tl.full([ROWS], 0, REAL)
    d = tl.full([ROWS], 0, REAL)
    end = V * tl.max(counts.to(tl.int32), 0)  # masked rows are not read
    for start in range(0, end, BLOCK):
        v = start + column
        read = counts[:, None] & (v < V)
        x = tl.load(logits + v * logits_v, read, float("-inf")).to(REAL)
        y = tl.load(u + v * u_v, read, 0).to(REAL)
        largest = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(largest == float("-inf"), 0, largest)  # else -inf - -inf
        e = tl.exp(x - shift[:, None])
        rescale = tl.exp(m - shift)
        z = z * rescale + tl.sum(e, 1)
        d = d * rescale + tl.sum(e * y, 1)
        m = largest

    shift = tl.where(m == float("-inf"), 0, m)[:, None]
    z = tl.where(counts, z, 1)
    scale = (w / z)[:, None]
    inner = (d / z)[:, None]
    for start in range(0, V, BLOCK):
        v = start + column
        read = counts[:, None] & (v < V)
        x = tl.load(logits + v * logits_v, read, float("-inf")).to(REAL)
        y = tl.load(u + v * u_v, read, 0).to(REAL)
        # Masked rows read x = -inf and so write zeros, for a scale of zero.
        HU = scale * tl.exp(x - shift) * (y - inner)
        tl.store(out + v * out_v, HU.to(out.dtype.element_ty), inside[:, None] & (v < V))


INTERPRETED = not isinstance(_sweeps, triton.JITFunction)  # with TRITON_INTERPRET=1

Axis = tuple[int, tuple[int, ...]]  # length, and the strides of all tensors


def product(logits: Tensor, weights: Tensor, u: Tensor, out: Tensor) -> Tensor:
    """``out = w p (u − ⟨p, u⟩)`` for u and out (*leading, *rows, V), which may be one tensor.

    Logits (*rows, V) and weights (*rows,) are read by their strides and never copied; reads are
    fastest where the classes are neighbours in memory. The host does not wait for the device.
    """
    leading, last = u.ndim - logits.ndim, u.ndim - 1
    tensors = (logits.expand(u.shape), u, out, weights.unsqueeze(-1).expand(u.shape))
    # The leading axes vary fastest, so that programs that read the same logits run together.
    order = [*range(leading, last), *range(leading), last]
    with torch.cuda.device_of(u):
        _launch(*(t.permute(order) for t in tensors))
    return out


def _launch(*tensors: Tensor) -> None:
    """The kernel on tensors (*rows, V) whose rows are numbered by at most three axes."""
    logits, u, out, weights = tensors
    axes = _axes(*tensors)
    if len(axes) > 3:
        for parts in zip(*tensors, strict=True):
            _launch(*parts)
        return
    one: Axis = (1, (0,) * len(tensors))
    lengths, strides = zip(*[*[one] * (3 - len(axes)), *axes], strict=True)
    rows, V = lengths[0] * lengths[1] * lengths[2], u.shape[-1]
    if not rows * V:
        return
    of_logits, of_u, of_out, of_weights = zip(*strides, strict=True)
    # Neighbours in memory are read together: classes, or else rows.
    block = min(triton.next_power_of_2(V), 4096 if logits.stride(-1) == 1 else 64)
    at_once = min(64, 4096 // block)
    double = torch.float64 in (logits.dtype, u.dtype)
    _sweeps[(triton.cdiv(rows, at_once),)](
        *(logits, u, out, weights, rows, V, lengths[1], lengths[2]),
        *(*of_logits, logits.stride(-1), *of_u, u.stride(-1), *of_out, out.stride(-1)),
        *of_weights,
        ROWS=at_once,
        BLOCK=block,
        REAL=tl.float64 if double else tl.float32,
        num_warps=max(1, at_once * block // 512),
        enable_fp_fusion=True,  # what Triton does unasked before 3.10, with a warning from 3.9
    )


def _axes(*tensors: Tensor) -> list[Axis]:
    """The row axes, neighbours taken for one where all tensors step through them evenly."""
    axes: list[Axis] = []
    steps = list(zip(*(t.stride()[:-1] for t in tensors), strict=True))
    for length, strides in zip(tensors[0].shape[:-1], steps, strict=True):
        if axes and axes[-1][1] == tuple(length * s for s in strides):
            axes[-1] = (axes[-1][0] * length, strides)
        elif length != 1:
            axes.append((length, strides))
    return axes
