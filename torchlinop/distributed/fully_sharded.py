"""Σ_b share_b A_b over the batches of all ranks, for models whose parameters are in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from torchlinop.batches import Batch
from torchlinop.distributed.gauss_newton import GaussNewton
from torchlinop.distributed.replicas import refuse_different_vectors
from torchlinop.distributed.sharded_method import Product, prepared
from torchlinop.distributed.sharded_objective import ShardedObjective
from torchlinop.distributed.sharded_options import MethodOptions, ShardedOptions, objective_of
from torchlinop.errors import NonFiniteError, OptionError
from torchlinop.losses.base import OutputMap
from torchlinop.losses.cross_entropy import CrossEntropy
from torchlinop.losses.elementwise import ElementwiseLoss
from torchlinop.losses.of_model import ForwardFn, LossOfModel
from torchlinop.losses.recognition import loss_of_output
from torchlinop.objective import LossFn
from torchlinop.operators.base import CurvatureOperator, Restriction
from torchlinop.operators.empirical_fisher import Losses, MeanOfLosses, gives_terms
from torchlinop.parameters import ParamFilter


class ShardedOperator(CurvatureOperator):
    """A matrix of a sharded model; vectors are the local blocks ``(local_size, k)`` of each rank.

    All ranks multiply together, by the same vector, of which each has its part.
    """

    def __init__(
        self,
        objective: ShardedObjective,
        product: Callable[[ShardedObjective], Product],
        options: MethodOptions,
        *,
        positive_semidefinite: bool = False,
    ) -> None:
        self._product = product(objective)
        self._method, said = prepared(objective, self._product, options)
        self._proven_finite = False
        self.objective = objective
        super().__init__(
            objective.space,
            description=[*objective.description, said],
            positive_semidefinite=positive_semidefinite and self._method.exact,
        )
        self.sharded_layout = objective.layout

    @property
    def method(self) -> str:
        """How products are taken, with step and error if by finite differences."""
        return self._method.name

    @property
    def error_estimate(self) -> float:
        """Of products, relative, if they are finite differences; 0 if they are exact."""
        return self._method.error

    def _matmat(self, V: Tensor) -> Tensor:
        objective = self.objective
        refuse_different_vectors(V, objective.ranks, objective.group)
        with objective.model.borrowed():
            columns = [self._product(self._method, objective.rounds(), v) for v in V.unbind(1)]
        AV = torch.stack(columns, dim=1)
        if not self._proven_finite and not objective.space.agree(not torch.isfinite(V).all()):
            self._refuse_non_finite(AV)
            self._proven_finite = True
        return AV

    def _refuse_non_finite(self, AV: Tensor) -> None:
        bad = int((~torch.isfinite(AV)).sum())
        if self.objective.space.agree(bad > 0):
            raise NonFiniteError(
                "the product has NaN or infinite entries: the loss or a derivative of it is not "
                "finite; clean the data, or the parameters"
            )

    def restrict(self, selection: ParamFilter | Tensor) -> Restriction:
        """Not of a matrix in shards; OptionError."""
        raise OptionError(
            "rows of a matrix in shards cannot be taken out afterwards; build the operator with "
            "param_filter=match_names(...) for a block of parameters"
        )

    def loss(self) -> Tensor:
        """The mean loss over all ranks: a scalar."""
        return self.objective.loss()

    def gradient(self) -> Tensor:
        """The gradient of the mean loss over all ranks: the local vector."""
        return self.objective.gradient()


class FSDPHessianOperator(ShardedOperator):
    """The Hessian of the mean loss over the data of all ranks, for a sharded model.

    For FSDP2 (``fully_shard``), HSDP, tensor parallelism, and mixtures. Every rank of the process
    group builds it, with the data of its own; the matrix is that of the union of the data.

    Args:
        model: sharded; given back bit-identical after every product.
        dataloader: batches of this rank: a list or an iterable that can be read again.
        loss_fn: ``(model, batch) -> scalar``.
        **options: see ``ShardedOptions``.

    Costs a product and two gradients of one batch to build; with differences, some 40 gradients of
    one batch. A product costs four gradients (FSDP2), three (tensor parallelism) or two
    (differences) over the data.

    Raises:
        ShardingError: FSDP1, no sharding, or one that is not known here.
        ProcessGroupError: there is none, or its ranks hold different models.
        OptionError: a method that cannot be had.
        DataError: what is wrong with the data of one rank, on all.
        DivergenceError: at a product, replicas (HSDP) passed different vectors.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: LossFn,
        **options: Unpack[ShardedOptions],
    ) -> None:
        objective, rest = objective_of(model, dataloader, loss_fn, options)
        super().__init__(objective, _hessian, rest)


def _hessian(objective: ShardedObjective) -> Product:
    return lambda method, rounds, v: method.hessian(objective, rounds, v)


def _gauss_newton(JtMJ: GaussNewton) -> Callable[[ShardedObjective], Product]:
    def of(objective: ShardedObjective) -> Product:
        return lambda method, rounds, v: method.gauss_newton(objective, rounds, JtMJ, v)

    return of


class FSDPGGNOperator(ShardedOperator):
    """The generalised Gauss-Newton matrix over the data of all ranks, for a sharded model.

    Args:
        model, dataloader: as for ``FSDPHessianOperator``.
        forward_fn: ``(model, batch) -> outputs``.
        loss_of_output_fn: as for ``GGNOperator``.
        **options: see ``ShardedOptions``.

    A product costs 7/3 gradients over the data.

    Raises: as ``FSDPHessianOperator``.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        forward_fn: ForwardFn,
        loss_of_output_fn: Any,
        **options: Unpack[ShardedOptions],
    ) -> None:
        loss = loss_of_output(loss_of_output_fn)
        function = LossOfModel(forward_fn, loss)
        objective, rest = objective_of(model, dataloader, function, options)
        super().__init__(
            objective,
            _gauss_newton(GaussNewton(function.outputs, loss.hessian)),
            rest,
            positive_semidefinite=isinstance(loss, CrossEntropy | ElementwiseLoss),
        )


class FSDPEmpiricalFisherOperator(ShardedOperator):
    """The second moment of the gradients of loss terms of all ranks, for a sharded model.

    Args:
        model, dataloader: as for ``FSDPHessianOperator``.
        loss_fn: ``(model, batch) -> scalar``, of which every sample goes through the model alone,
            or the losses (N,) of all samples at once; or the ``forward_fn`` of a
            ``FSDPGGNOperator``, if ``loss_of_output_fn`` is given.
        loss_of_output_fn: as for ``GGNOperator``.
        **options: see ``ShardedOptions``.

    A product costs 7/3 gradients over the data. Samples must not depend on each other; this is
    not tested here, as it is by ``EmpiricalFisherOperator``.

    Raises: as ``FSDPHessianOperator``.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: ForwardFn,
        loss_of_output_fn: Any = None,
        **options: Unpack[ShardedOptions],
    ) -> None:
        if loss_of_output_fn is None:
            self._of_losses(model, dataloader, loss_fn, options)
        else:
            self._of_outputs(model, dataloader, loss_fn, loss_of_output_fn, options)

    def _of_outputs(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        forward_fn: ForwardFn,
        loss_of_output_fn: Any,
        options: ShardedOptions,
    ) -> None:
        function = LossOfModel(forward_fn, loss_of_output(loss_of_output_fn))
        objective, rest = objective_of(model, dataloader, function, options, of_samples=True)
        loss = function.loss.with_weighting(objective.data.batches.weighting)

        def metric(outputs: Tensor, batch: Batch) -> OutputMap:
            return loss.terms(outputs, batch).outer()

        product = _gauss_newton(GaussNewton(function.outputs, metric))
        super().__init__(objective, product, rest, positive_semidefinite=True)

    def _of_losses(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        loss_fn: ForwardFn,
        options: ShardedOptions,
    ) -> None:
        mean = MeanOfLosses(loss_fn)
        objective, rest = objective_of(model, dataloader, mean, options, of_samples=True)
        with objective.model.borrowed(), torch.no_grad():
            b, batch, _ = objective.first_round()[0]
            several = objective.together(
                lambda: gives_terms(loss_fn(objective.model.place(b), batch), batch)
            )
        if objective.space.agree(several):
            weights = Losses(mean.weights)

            def metric(losses: Tensor, batch: Batch) -> OutputMap:
                return weights(losses, batch, 0)

            product = _gauss_newton(GaussNewton(loss_fn, metric))
        else:
            alone: ShardedOptions = {**options, "microbatch_size": 1}
            objective, rest = objective_of(model, dataloader, mean, alone, of_samples=True)
            product = _gauss_newton(GaussNewton(mean, lambda loss, batch: lambda u: u))
        super().__init__(objective, product, rest, positive_semidefinite=True)
