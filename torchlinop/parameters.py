"""Which parameters are differentiated, and which slot of the flat vector each one has."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchlinop.dtypes import coarsest
from torchlinop.errors import NoParametersError, OptionError, ParameterError, VectorError
from torchlinop.signatures import takes

ParamFilter = Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class NameFilter:
    """Accepts a parameter whose whole name matches one of the regular expressions."""

    patterns: tuple[str, ...]  # as the user wrote them
    expressions: tuple[re.Pattern[str], ...]

    def __call__(self, name: str, parameter: nn.Parameter) -> bool:
        return any(expression.search(name) for expression in self.expressions)


def match_names(*patterns: str) -> NameFilter:
    """Filter by shell patterns on the whole name; ``*`` also crosses dots.

    Example:
        >>> match_names("blocks.*.attn.*")("blocks.0.attn.q.weight", None)
        True
    """
    return NameFilter(patterns, tuple(re.compile(fnmatch.translate(p)) for p in patterns))


def match_regex(*patterns: str) -> NameFilter:
    r"""Filter by regular expressions, found anywhere in the name.

    Example:
        >>> match_regex(r"blocks\.\d+\.mlp\.")("blocks.11.mlp.weight", None)
        True
    """
    return NameFilter(patterns, tuple(re.compile(p) for p in patterns))


@dataclass(frozen=True)
class Slot:
    """One tensor's place in the flat vector: entries ``offset`` to ``stop``, row-major."""

    names: tuple[str, ...]  # the first is the parameter's name, the others are its aliases
    shape: torch.Size
    offset: int
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class ParameterLayout:
    """The selected parameters in slots of one flat vector, in the order of ``named_parameters``.

    A storage has one slot: tied parameters appear once, under the name that comes first.
    """

    slots: tuple[Slot, ...]
    frozen: tuple[str, ...]  # names of parameters with requires_grad=False
    filtered: tuple[str, ...]  # names of trainable parameters that the filter left out

    @classmethod
    def of(
        cls, model: nn.Module, param_filter: ParamFilter | None = None, *, sharded: bool = False
    ) -> ParameterLayout:
        """Select the trainable parameters that ``param_filter(name, parameter)`` accepts.

        A tied parameter is selected when the filter accepts any of its names. With ``sharded``,
        parameters may be DTensors, and are described as a whole.

        Raises:
            NoParametersError: nothing is selected.
            OptionError: the filter is no function of two arguments.
            ParameterError: a selected parameter is complex or has no data, or is a DTensor where
                none is expected.
        """
        if param_filter is not None:
            _refuse_unfit_filter(param_filter)
        tied: dict[object, tuple[nn.Parameter, list[str]]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(_storage(parameter), (parameter, []))[1].append(name)
        slots: list[Slot] = []
        frozen: list[str] = []
        filtered: list[str] = []
        for parameter, names in tied.values():
            if not parameter.requires_grad:
                frozen += names
            elif param_filter and not any(param_filter(name, parameter) for name in names):
                filtered += names
            else:
                _refuse_unfit(names[0], parameter, sharded)
                offset = slots[-1].stop if slots else 0
                shape, dtype, device = parameter.shape, parameter.dtype, parameter.device
                slots.append(Slot(tuple(names), shape, offset, dtype, device))
        if not slots:
            raise NoParametersError(_nothing_selected(model, param_filter, frozen, filtered))
        return cls(tuple(slots), tuple(frozen), tuple(filtered))

    @property
    def size(self) -> int:
        """Entries of the flat vector."""
        return self.slots[-1].stop

    @property
    def names(self) -> tuple[str, ...]:
        """One name a slot."""
        return tuple(slot.name for slot in self.slots)

    @property
    def aliases(self) -> dict[str, str]:
        """Every further name of a tied parameter, with the name that holds its slot."""
        return {alias: slot.name for slot in self.slots for alias in slot.names[1:]}

    @property
    def status(self) -> dict[str, str]:
        """Every parameter name with "selected", "alias of NAME", "frozen" or "filtered out"."""
        return (
            dict.fromkeys(self.names, "selected")
            | {alias: f"alias of {name}" for alias, name in self.aliases.items()}
            | dict.fromkeys(self.frozen, "frozen")
            | dict.fromkeys(self.filtered, "filtered out")
        )

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the selected parameters, and float32 at least."""
        dtype = torch.float32
        for slot in self.slots:
            dtype = torch.promote_types(dtype, slot.dtype)
        return dtype

    @property
    def precision(self) -> torch.dtype:
        """The dtype of the coarsest selected parameter: what products can be accurate to."""
        return coarsest(slot.dtype for slot in self.slots)

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """A flat vector (n,) as the model's tensors: shape, dtype and device of each parameter.

        Differentiable. Views where dtype and device allow it; aliases share one tensor.
        """
        # One split, whose backward is one concatenation: n slices would each pad to length n.
        pieces = theta.split([slot.numel for slot in self.slots])
        named = {}
        for slot, piece in zip(self.slots, pieces, strict=True):
            tensor = piece.view(slot.shape).to(dtype=slot.dtype, device=slot.device)
            named.update(dict.fromkeys(slot.names, tensor))
        return named

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """The named tensors (one for every slot) as a new flat vector (n,), or block (n, k).

        Tensors of shape ``slot.shape`` give a vector, of shape ``(*slot.shape, k)`` a block.
        """
        device, columns = self.slots[0].device, []
        for slot in self.slots:
            if slot.name not in named:
                raise VectorError(
                    f"expected a tensor for every slot, but {slot.name!r} is missing; "
                    f"pass all of: {', '.join(self.names)}"
                )
            tensor = named[slot.name].detach()
            columns.append(tensor.reshape(slot.numel, *tensor.shape[len(slot.shape) :]))
        return torch.cat([c.to(dtype=self.dtype, device=device) for c in columns])

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """A vector (n,) or block (n, k), an eigenvector say, as views by parameter name.

        Shapes are ``slot.shape`` for a vector and ``(*slot.shape, k)`` for a block.
        """
        if v.shape[:1] != (self.size,):
            raise VectorError(
                f"expected a vector of shape ({self.size},) or a block ({self.size}, k), "
                f"got {tuple(v.shape)}; pass one of this operator"
            )
        columns = v.shape[1:]
        return {s.name: v[s.offset : s.stop].view(s.shape + columns) for s in self.slots}

    def restrict(self, param_filter: ParamFilter) -> tuple[Slot, ...]:
        """The slots, at their offsets here, that ``param_filter(name, parameter)`` accepts.

        ``parameter`` is a stand-in without data: of the right shape and dtype, on "meta".

        Raises:
            NoParametersError: no slot is accepted.
            OptionError: the filter is no function of two arguments.
        """
        _refuse_unfit_filter(param_filter)
        slots = tuple(
            slot
            for slot in self.slots
            for stand_in in [nn.Parameter(torch.empty(slot.shape, dtype=slot.dtype, device="meta"))]
            if any(param_filter(name, stand_in) for name in slot.names)
        )
        if not slots:
            raise NoParametersError(
                f"the restriction selects none of the operator's {len(self.slots)} tensors; "
                f"choose among: {', '.join(self.names)}"
            )
        return slots

    def packed(self, slots: tuple[Slot, ...]) -> ParameterLayout:
        """The layout of these slots alone, moved together."""
        offsets = [0, *itertools.accumulate(slot.numel for slot in slots)]
        moved = (replace(slot, offset=o) for slot, o in zip(slots, offsets, strict=False))
        left = tuple(name for slot in self.slots if slot not in slots for name in slot.names)
        return ParameterLayout(tuple(moved), self.frozen, self.filtered + left)


def _refuse_unfit_filter(param_filter: object) -> None:
    if not callable(param_filter):
        given = repr(param_filter)
    elif not takes(param_filter, 2):
        name = getattr(param_filter, "__name__", repr(param_filter))
        given = f"{name}, which does not take two arguments"
    else:
        return
    raise OptionError(
        f"expected param_filter to be a function (name, parameter) -> bool, got {given}; "
        "pass match_names(...) for patterns of names"
    )


def _storage(parameter: nn.Parameter) -> object:
    """Equal for parameters that are the same numbers in memory."""
    if _unfit(parameter) or parameter.numel() == 0:
        return id(parameter)
    where = (parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype)
    return (*where, parameter.requires_grad)


def _unfit(parameter: nn.Parameter, sharded: bool = False) -> str | None:
    if nn.parameter.is_lazy(parameter):
        return "is not initialised; run the model once on a batch before building the operator"
    if type(parameter.data).__name__ == "DTensor" and not sharded:
        return (
            "is sharded (DTensor); use FSDPHessianOperator, FSDPGGNOperator or "
            "FSDPEmpiricalFisherOperator of torchlinop.distributed"
        )
    if parameter.device.type == "meta":
        return "is on the meta device and has no data; load the weights first"
    if parameter.is_complex():
        return "is complex; curvature is defined for real parameters: pass its real view"
    return None


def _refuse_unfit(name: str, parameter: nn.Parameter, sharded: bool) -> None:
    reason = _unfit(parameter, sharded)
    if reason:
        raise ParameterError(f"parameter {name!r} {reason}, or leave it out with param_filter")


def _nothing_selected(
    model: nn.Module, param_filter: ParamFilter | None, frozen: list[str], filtered: list[str]
) -> str:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not parameters:
        return (
            "the model has no parameters (quantised layers hold none); give the operator the "
            "model from before quantisation"
        )
    if not filtered:
        return (
            f"the model has no trainable parameters ({len(frozen)} are frozen): "
            "call requires_grad_(True) on those to differentiate"
        )
    matching = sum(bool(param_filter and param_filter(n, parameters[n])) for n in frozen)
    message = f"param_filter matches none of the {len(filtered)} trainable parameters; "
    message += f"{matching} frozen ones match. "
    patterns = param_filter.patterns if isinstance(param_filter, NameFilter) else ()
    close = [c for p in patterns for c in difflib.get_close_matches(p, filtered, n=3, cutoff=0.3)]
    return message + f"Closest names: {', '.join(dict.fromkeys(close or filtered[:5]))}"
