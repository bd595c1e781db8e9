"""H u = w (p u − p ⟨p, u⟩), p = softmax(logits): the Hessian of cross-entropy, in little memory."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from torchlinop.errors import OptionError
from torchlinop.losses.base import OutputMap

Backend = Literal["auto", "eager", "compile", "triton"]

# (u, out) -> out = H u, where out may be u itself.
Product = Callable[[Tensor, Tensor], Tensor]
Builder = Callable[[Tensor, Tensor], Product]  # of logits and weights

log = logging.getLogger("torchlinop")


def cross_entropy_map(logits: Tensor, weights: Tensor, backend: Backend = "auto") -> OutputMap:
    """``u ↦ w (p u − p ⟨p, u⟩)`` for u of shape (*leading, *rows, V), which is overwritten.

    Logits are (*rows, V) with any strides; weights are (*rows,), 0 for masked rows, where the
    product is 0 whatever the logits. A logit of −∞ in any other row has p = 0. Sums are
    accumulated in float32 at least.

    ``"eager"`` keeps p, one buffer of the size of the logits, and needs a few cached rows
    besides. ``"compile"`` (``torch.compile``) and ``"triton"`` keep the logits and compute p anew
    in one kernel. ``"auto"`` is ``"triton"`` for CUDA tensors and ``"eager"`` for others, so that
    nothing is compiled on a CPU. Where ``"compile"`` fails, or ``"auto"`` on a GPU, for lack of a
    compiler, say, the log says so once, and the products are eager from then on.

    Raises:
        OptionError: the backend is unknown, or ``"triton"`` cannot work on these tensors.
    """
    product = _builder(backend)(logits.detach(), weights.detach())
    return lambda u: product(u, u)


def cross_entropy_hvp(
    logits: Tensor, weights: Tensor, u: Tensor, backend: Backend = "auto"
) -> Tensor:
    """``w (p u − p ⟨p, u⟩)`` as new memory: one product, with the arguments of the map.

    ``"eager"`` allocates two buffers of the size of the logits, p and the result.
    """
    out = torch.empty_like(u, requires_grad=False)
    return _builder(backend)(logits.detach(), weights.detach())(u.detach(), out)


def _times(P: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """``w p (u − ⟨p, u⟩)``: the subtraction first, so that p near 1 loses no digits."""
    return (u - (P * u).sum(-1, keepdim=True)).mul_(P).mul_(w)


def _softmax(logits: Tensor, w: Tensor) -> Tensor:
    """p, in float32 at least, with zeros in masked rows, which may hold NaN.

    Half precisions would round 1 - p to 0. The sum is Tensor.sum, which is pairwise: that inside
    Tensor.softmax makes p of 130,000 classes wrong by 1e-5 on a CPU.
    """
    exponents = logits.to(torch.promote_types(logits.dtype, torch.float32))
    P = (exponents - exponents.amax(-1, keepdim=True)).exp_()
    return P.div_(P.sum(-1, keepdim=True)).masked_fill_(w == 0, 0)


# Eager


@torch.no_grad()
def _eager(logits: Tensor, weights: Tensor) -> Product:
    w = weights.unsqueeze(-1)
    P = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    for P_rows, logits_rows, w_rows in _pieces(P, logits, w.expand_as(P)):
        P_rows.copy_(_softmax(logits_rows, w_rows))

    @torch.no_grad()
    def product(u: Tensor, out: Tensor) -> Tensor:
        for out_rows, *rows in _pieces(out, P.expand_as(u), w.expand_as(u), u):
            out_rows.copy_(_times(*rows))
        return out

    return product


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of whole rows of tensors of one shape, row after row, whatever their strides.

    On a CPU what is made of a piece stays in its caches, so that memory is read and written once;
    yet pieces are large enough to be worth dividing between threads. On a GPU they bound the
    memory of what is in between.
    """
    first = tensors[0]
    entries = 2**19 if first.device.type == "cpu" else 2**25
    if first.ndim == 1 or first.numel() <= entries:
        yield tensors
        return
    at_once = entries * len(first) // first.numel()
    if at_once:
        yield from zip(*(t.split(at_once) for t in tensors), strict=True)
        return
    for parts in zip(*tensors, strict=True):
        yield from _pieces(*parts)


# Fused by a compiler


def _formula(logits: Tensor, weights: Tensor, u: Tensor, out: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():  # past its limit of recompilations
        return _eager(logits, weights)(u, out)
    w = weights.unsqueeze(-1)
    return out.copy_(_times(_softmax(logits, w), w, u))


@functools.cache
def _compiled_formula() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_formula, dynamic=True)  # batches are ragged


def _compiled(logits: Tensor, weights: Tensor) -> Product:
    def product(u: Tensor, out: Tensor) -> Tensor:
        # Models are evaluated under the stance "force_eager", which is not meant for this.
        with torch.no_grad(), torch.compiler.set_stance("default"):
            return _compiled_formula()(logits, weights, u, out)

    return product


def _triton(logits: Tensor, weights: Tensor) -> Product:
    try:
        from torchlinop.losses import triton_cross_entropy as kernels  # noqa: PLC0415 optional
    except ImportError as error:
        raise OptionError(
            f'backend="triton" needs the package triton ({error}); install it, or pass '
            'backend="auto"'
        ) from error
    if logits.device.type == "cpu" and not kernels.INTERPRETED:
        raise OptionError(
            'backend="triton" expected logits on a GPU, got logits on the CPU; pass '
            'backend="auto", or set TRITON_INTERPRET=1 before triton is imported'
        )
    return functools.partial(kernels.product, logits, weights)


_failed: set[str] = set()  # names of what did not compile in this process


def _or_eager(name: str, build: Builder, logits: Tensor, weights: Tensor) -> Product:
    eager = functools.cache(lambda: _eager(logits, weights))

    def product(u: Tensor, out: Tensor) -> Tensor:
        # Who records operations of torch sees no kernels.
        if name in _failed or _get_current_dispatch_mode() is not None:
            return eager()(u, out)
        try:
            return build(logits, weights)(u, out)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises; nothing is written before it runs
            HU = eager()(u, out)  # raises again what is the caller's mistake
            _failed.add(name)
            log.warning("cross-entropy by %s failed, using eager products: %s", name, error)
            return HU

    return product


def _compiled_or_eager(logits: Tensor, weights: Tensor) -> Product:
    return _or_eager("compile", _compiled, logits, weights)


@functools.cache  # once a process
def _log_choice(name: str, device: str) -> None:
    log.info("products with the Hessian of cross-entropy on %s: %s", device, name)


def _auto(logits: Tensor, weights: Tensor) -> Product:
    _log_choice("triton" if logits.is_cuda else "eager", logits.device.type)
    if logits.is_cuda:
        return _or_eager("triton", _triton, logits, weights)
    return _eager(logits, weights)


_BUILDERS: dict[str, Builder] = {
    "auto": _auto,
    "eager": _eager,
    "compile": _compiled_or_eager,
    "triton": _triton,
}


def _builder(backend: str) -> Builder:
    if backend not in _BUILDERS:
        raise OptionError(
            f"unknown backend {backend!r} of cross-entropy; choose one of {', '.join(_BUILDERS)}"
        )
    return _BUILDERS[backend]
