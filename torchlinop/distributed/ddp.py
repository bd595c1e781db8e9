"""The operators on the data of all ranks, by names and signatures of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch.distributed as dist
from torch import nn

from torchlinop.articles import kind_of
from torchlinop.batches import Batch
from torchlinop.distributed.data_parallel import ranks_of
from torchlinop.errors import OptionError
from torchlinop.losses.of_model import ForwardFn
from torchlinop.objective import LossFn
from torchlinop.operators.empirical_fisher import EmpiricalFisherOperator
from torchlinop.operators.gauss_newton import GGNOperator, LossHvp
from torchlinop.operators.hessian import HessianOperator
from torchlinop.operators.of_objective import ProductOptions


class DDPHessianOperator(HessianOperator):
    """The Hessian over the data of all ranks: ``data_parallel(HessianOperator)``.

    Args:
        model: may be wrapped in DistributedDataParallel, whose hooks are left alone; the same on
            every rank.
        dataloader: of this rank, by a ``DistributedSampler`` say; ranks may have different
            numbers of samples and batches.
        loss_fn: as for ``HessianOperator``.
        process_group: of the ranks; all processes unless given.
        microbatch_unsafe, backend: there for calls written for hessian-eigenthings; microbatches
            need no such promise here, and ``backend`` is None.
        **options: as for ``HessianOperator``; ``num_batches`` is of every rank.

    Costs of a product, and errors: see ``data_parallel``.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: LossFn,
        *,
        process_group: dist.ProcessGroup | None = None,
        microbatch_unsafe: bool = False,
        backend: None = None,
        **options: Unpack[ProductOptions],
    ) -> None:
        ranks = ranks_of(process_group)
        with ranks.agreed():
            _refuse_backend(backend)
            super().__init__(model, dataloader, loss_fn, **options)
        self.unite(ranks)


class DDPGGNOperator(GGNOperator):
    """The generalised Gauss-Newton matrix over the data of all ranks.

    Arguments are those of ``GGNOperator`` and ``DDPHessianOperator``; for costs of a product, and
    errors, see ``data_parallel``.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        forward_fn: ForwardFn,
        loss_of_output_fn: Any,
        *,
        loss_hvp: LossHvp = "analytical",
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[ProductOptions],
    ) -> None:
        ranks = ranks_of(process_group)
        with ranks.agreed():
            super().__init__(
                model, dataloader, forward_fn, loss_of_output_fn, loss_hvp=loss_hvp, **options
            )
        self.unite(ranks)


class DDPEmpiricalFisherOperator(EmpiricalFisherOperator):
    """The empirical Fisher matrix over the data of all ranks.

    Arguments are those of ``EmpiricalFisherOperator`` and ``DDPHessianOperator``; for costs of a
    product, and errors, see ``data_parallel``.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: ForwardFn,
        loss_of_output_fn: Any = None,
        *,
        per_sample: bool = True,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[ProductOptions],
    ) -> None:
        ranks = ranks_of(process_group)
        with ranks.agreed():
            super().__init__(
                model, dataloader, loss_fn, loss_of_output_fn, per_sample=per_sample, **options
            )
        self.unite(ranks)


def _refuse_backend(backend: object) -> None:
    if backend is not None:
        raise OptionError(
            f"expected no backend, got {kind_of(backend)}: vectors are torch tensors here, "
            "on the device of the parameters; leave it out"
        )
