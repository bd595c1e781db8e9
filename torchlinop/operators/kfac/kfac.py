"""K = ⊕ B ⊗ A (K-FAC), and with exact second moments in its eigenbasis (EKFAC)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Unpack, get_args

from torch import nn

from torchlinop.batches import Batch
from torchlinop.choices import refuse_unknown
from torchlinop.errors import OptionError
from torchlinop.from_model import (
    ObjectiveOptions,
    OutputObjective,
    output_objective,
    refuse_bad_seed,
)
from torchlinop.losses.of_model import ForwardFn
from torchlinop.model_state import unwrap
from torchlinop.operators.kfac.coverage import Policy
from torchlinop.operators.kfac.factors import collect
from torchlinop.operators.kfac.layers import Layer
from torchlinop.operators.kfac.parts import Parts, Plan, parts_of
from torchlinop.operators.kfac.rules import refuse_unfit_modules
from torchlinop.operators.kfac.survey import survey
from torchlinop.operators.kfac.vectors import (
    FisherType,
    HessianRoot,
    NoVectors,
    TermGradients,
    Vectors,
    sampled_gradients,
)
from torchlinop.operators.kronecker import KroneckerBlock, KroneckerOperator
from torchlinop.per_sample import refuse_mixed_samples
from torchlinop.preflight import preflight
from torchlinop.ranks import ALONE, Ranks
from torchlinop.union import united

Approximation = Literal["expand", "reduce"]


class KFACOperator(KroneckerOperator):
    """K-FAC: for every layer the Kronecker product of two moments, of inputs and of gradients.

    For a weight W (d_out, d_in), row-major, the block is ``B ⊗ A``. A is the mean of ``a aᵀ`` over
    samples and positions (tokens, places of an image), B the sum of ``g gᵀ`` over the vectors v
    with ``Σ v vᵀ = ∇²L``, where g is v backpropagated to the output of the layer. A bias has the
    block B. Loss terms of one sample are never mixed, for "mc" neither.

    Equal to the GGN's block (of weight and bias jointly) for one sample with one loss term, in
    layers applied at one position; for weights of linear networks with squared errors; and in
    general an approximation. A tied weight gets the sum of the products of its uses, projected on
    one eigenbasis, so that its trace is kept. Normalisations get their exact block of (weight,
    bias). Embeddings count their rows, for "reduce" too.

    Padding does not count in A: positions that are 0 in an ``attention_mask`` (N, T) of the batch,
    for every layer with as many positions as that has tokens. No mask is applied to a batch with
    keys ``decoder_...``, or with integer ``labels`` of another length, as two sequences cannot be
    told apart by their lengths.

    Args:
        model, dataloader, forward_fn, loss_of_output_fn: as for ``GGNOperator``.
        fisher_type: ``"type-2"`` (exact), ``"mc"`` (targets drawn from the model),
            ``"empirical"`` (the gradients of the loss terms), or ``"forward-only"`` (B = I).
        approximation: ``"expand"`` takes the positions of a sample for samples of their own;
            ``"reduce"`` averages a over them and sums g, before moments are taken.
        separate_weight_and_bias: False makes one block of weight and bias, with A of ``[a, 1]``.
        mc_samples, sampling_seed: how many draws for "mc", and of which numbers; those of
            ``FisherOperator``, independent of the batches.
        unsupported: what becomes of parameters without a rule: ``"error"`` refuses them, ``"diag"``
            takes the exact diagonal of the matrix that is approximated, ``"identity"`` and
            ``"skip"`` an identity and a zero block.
        ranks: processes that have other data; ``torchlinop.distributed.data_parallel`` gives them.
        **options: see ``ObjectiveOptions``.

    Computed here, once; neither model nor data are kept. Costs of finding out what is covered:
    two forward and ``2 + 2 log₂ N`` backward passes of the data. Costs of the factors: a forward
    pass of the data, a backward pass for every vector (C for C classes, ``mc_samples`` for "mc",
    one for "empirical", each times the loss terms of a sample), and an eigendecomposition of every
    factor. Memory: activations of a batch, the factors, and their eigenvectors; for "type-2" also
    C vectors of the size of the outputs of a batch, that is C² numbers for every loss term: for
    large vocabularies choose "mc", or a small ``microbatch_size``. A product costs about as much
    as one with every factor.

    Raises:
        KFACCoverageError: a parameter has no rule, or a layer's input does not begin with the
            samples.
        SampleMixingError: samples depend on each other.
        NonFiniteError: inputs, outputs or derivatives on a batch are not finite.
        OptionError: an option is none of those above.
        TorchlinopError: as ``GGNOperator``.

    Sources: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature, ICML 2015; Grosse and Martens, A Kronecker-factored approximate Fisher matrix for
    convolution layers, ICML 2016; Eschenhagen et al., Kronecker-factored approximate curvature
    for modern neural network architectures, NeurIPS 2023 (expand and reduce).
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Batch],
        forward_fn: ForwardFn,
        loss_of_output_fn: Any,
        *,
        fisher_type: FisherType = "type-2",
        approximation: Approximation = "expand",
        separate_weight_and_bias: bool = True,
        mc_samples: int = 1,
        sampling_seed: int = 0,
        unsupported: Policy = "error",
        ranks: Ranks = ALONE,
        **options: Unpack[ObjectiveOptions],
    ) -> None:
        with_gradients = fisher_type != "forward-only"
        with ranks.agreed():
            refuse_unknown("fisher_type", fisher_type, get_args(FisherType))
            refuse_unknown("approximation", approximation, get_args(Approximation))
            refuse_unknown("unsupported", unsupported, get_args(Policy))
            _refuse_bad_draws(mc_samples)
            refuse_bad_seed("sampling_seed", sampling_seed)
            if not with_gradients:
                self._refuse_no_gradients(unsupported)
            refuse_unfit_modules(unwrap(model))
            objective = output_objective(
                model, dataloader, forward_fn, loss_of_output_fn, of_samples=True, **options
            )
            vectors = _vectors(fisher_type, objective, mc_samples, sampling_seed)
            refuse_mixed_samples(objective, objective.function.outputs)
            facts = preflight(objective, second_order=False, of=objective.function.outputs)
        objective = united(objective, ranks)
        found = survey(objective, facts.unused, with_gradients)
        self.coverage = found.coverage(objective, unsupported)
        self.coverage.enforce()
        plan = Plan(separate_weight_and_bias, approximation == "reduce", with_gradients)
        made = parts_of(objective, found, unsupported, plan)
        super().__init__(
            objective.ranks.space(objective.space, sums=False),
            self._blocks(objective, found.layers, made, vectors),
            layout=objective.layout,
            description=[*objective.description, f"{fisher_type}, {approximation}"],
            notes=[self.coverage.summary, *facts.notes(objective)],
        )

    def _blocks(
        self,
        objective: OutputObjective,
        layers: Sequence[Layer],
        made: Parts,
        vectors: Vectors,
    ) -> list[KroneckerBlock]:
        collect(objective, layers, [*made.moments, *made.parts], vectors)
        return [part.block(objective.space.dtype) for part in made.parts]

    def _refuse_no_gradients(self, unsupported: Policy) -> None:
        if unsupported == "diag":
            raise OptionError(
                'unsupported="diag" takes a diagonal of squared gradients, which '
                'fisher_type="forward-only" does not compute; choose "identity" or "skip"'
            )


class EKFACOperator(KFACOperator):
    """EKFAC: K-FAC's eigenvectors with the best eigenvalues for them, ``λ = Σ_v Σ_n (Qᵀ γ_vn)²``.

    γ_vn is the gradient of sample n for the vector v, all its positions and all uses of a tied
    weight together. So the trace is that of the GGN's blocks (of the approximated matrix's, for
    other Fisher types). Over an eigenspace of a factor, such as the null space of A for
    "reduce", λ is averaged: the basis there is arbitrary, and would depend on the batches.

    Arguments and errors are those of ``KFACOperator``, without ``"forward-only"``. Costs twice as
    much, as all data are put through the model again.

    Source: George et al., Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis, NeurIPS 2018.
    """

    def _blocks(
        self,
        objective: OutputObjective,
        layers: Sequence[Layer],
        made: Parts,
        vectors: Vectors,
    ) -> list[KroneckerBlock]:
        collect(objective, layers, [*made.moments, *made.parts], vectors)
        corrected = [part.corrected(objective.space.dtype) for part in made.parts]
        return super()._blocks(objective, layers, Parts(corrected, []), vectors)

    def _refuse_no_gradients(self, unsupported: Policy) -> None:
        raise OptionError(
            'EKFAC needs gradients, which fisher_type="forward-only" does not compute; choose '
            '"type-2", "mc" or "empirical", or KFACOperator'
        )


def _vectors(fisher_type: FisherType, objective: OutputObjective, draws: int, seed: int) -> Vectors:
    loss = objective.function.loss
    match fisher_type:
        case "type-2":
            return HessianRoot(loss)
        case "mc":
            objective.data.refuse_reordering()
            return sampled_gradients(loss, draws, seed)
        case "empirical":
            return TermGradients(loss)
        case "forward-only":
            return NoVectors()


def _refuse_bad_draws(mc_samples: int) -> None:
    if not (isinstance(mc_samples, int) and mc_samples >= 1):
        raise OptionError(
            f"expected mc_samples to be an integer of at least 1, got {mc_samples!r}; leave it out"
        )
