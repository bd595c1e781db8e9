"""V ↦ A V written down as one program; what does not depend on V is computed once, beforehand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from torchlinop.derivatives import LinearMap
from torchlinop.errors import CaptureError, DataError

Run = Callable[..., Tensor]  # (V, *constants) -> A V

# Operations whose result on the host, or its shape, depends on values.
_ASKING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


_MASKS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class Program:
    """``V ↦ A V`` for blocks of one shape (n, k) and one memory layout, as fresh memory."""

    run: Run
    constants: tuple[Tensor, ...]
    read: tuple[tuple[Tensor, int], ...]  # what the constants were computed from, with its version

    def __call__(self, V: Tensor) -> Tensor:
        if any(tensor._version != version for tensor, version in self.read):
            raise DataError(written_over())
        return self.run(V, *self.constants)


def written_over() -> str:
    """What to say where data or parameters that are used in place were written to."""
    return (
        "a batch or a frozen parameter, which the operator uses in place, was written to after "
        "its first product, so that there is no fixed matrix any more; build a new operator, or "
        "give it copies"
    )


def first_line(error: Exception) -> str:
    """Of its message: what follows in torch's is advice for other situations."""
    return str(error).strip().partition("\n")[0]


def traced(product: LinearMap, V: Tensor) -> Program:
    """``product`` as a program for blocks like V.

    Its operations are recorded below autograd and vmap, which cost nothing when it is run. Costs
    a product, and a fraction of a millisecond an operation; memory: what is computed beforehand,
    up to a half of what the graphs at θ hold.

    Raises:
        CaptureError: the product asks for values, as an ``if`` on a tensor does.
    """
    tape = _Tape(V)
    # On the thread that records, also where autograd has one of its own for a device.
    with torch.no_grad(), torch.autograd.set_multithreading_enabled(False):
        with tape:
            AV = product(V)
        before, run = _parted(tape.finished(AV))
        return Program(run, before(*tape.attributes), _versions(tape.attributes))


class _Tape(TorchDispatchMode):
    """Writes every operation down as a node of a graph."""

    def __init__(self, V: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.attributes: list[Tensor] = []  # what is read besides V, in the order of its nodes
        self._graph = fx.Graph()
        self._nodes: MutableMapping[Tensor, fx.Node] = WeakTensorKeyDictionary()
        self._nodes[V] = self._graph.placeholder("V")
        self._of_V = {self._nodes[V]}  # the nodes that depend on it

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        values = func(*args, **(kwargs or {}))
        asking = not {*func.tags}.isdisjoint(_ASKING) and not _picks_by_number(func, args)
        args, kwargs = tree_map_only(Tensor, self._node, (args, kwargs or {}))
        of_V = any(leaf in self._of_V for leaf in tree_leaves((args, kwargs)))
        if of_V and asking:
            raise CaptureError(
                f"the product asks for values ({func}), as an if on a tensor does, and so cannot "
                "be traced; leave out compile and cuda_graphs"
            )
        node = self._graph.call_function(func, args, kwargs)
        self._name(values, node, of_V)
        return values

    def finished(self, AV: Tensor) -> fx.Graph:
        """The graph that gives this tensor."""
        self._graph.output(self._node(AV))
        return self._graph

    def _node(self, tensor: Tensor) -> fx.Node:
        if tensor not in self._nodes:
            self._nodes[tensor] = self._graph.get_attr(f"attribute_{len(self.attributes)}")
            self.attributes.append(tensor)
        return self._nodes[tensor]

    def _name(self, values: Any, node: fx.Node, of_V: bool) -> None:
        if of_V:
            self._of_V.add(node)
        if isinstance(values, Tensor):
            self._nodes[values] = node
        elif isinstance(values, tuple | list):
            for i, value in enumerate(values):
                self._name(value, self._graph.call_function(operator.getitem, (node, i)), of_V)


def _picks_by_number(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether entries are picked by their numbers, not by a mask, which says how many they are."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in _MASKS for index in args[1])


def refuse_other_product(program: Program, product: LinearMap, V: Tensor) -> None:
    """Raise CaptureError unless the program multiplies another block as ``product`` does.

    What is computed by another library, or draws random numbers, is not recorded. One product.
    """
    W = torch.linspace(-1, 2, V.numel(), dtype=V.dtype, device=V.device).view(V.mT.shape).mT
    with torch.no_grad():
        AW = product(W)
        error, size = (float(torch.linalg.vector_norm(D)) for D in (program(W) - AW, AW))
    if error > _tolerance([V, *program.constants]) * size:
        raise CaptureError(
            f"the product as traced is another one (relative error {error / (size or error):.1g}): "
            "part of it is computed outside of torch, or at random; leave out compile and "
            "cuda_graphs"
        )


def _tolerance(tensors: Iterable[Tensor]) -> float:
    """Relative; half the digits of the coarsest dtype."""
    real = [t.dtype for t in tensors if t.is_floating_point()]
    return float(max(torch.finfo(dtype).eps for dtype in real) ** 0.5)


def _versions(tensors: Iterable[Tensor]) -> tuple[tuple[Tensor, int], ...]:
    """One tensor for each memory: its views share its version."""
    distinct = {t.untyped_storage().data_ptr(): t for t in tensors if not t.is_inference()}
    return tuple((t, t._version) for t in distinct.values())


# Two programs of one: what is computed beforehand, and what is computed for every V.


def _parted(graph: fx.Graph) -> tuple[Callable[..., tuple[Tensor, ...]], fx.GraphModule]:
    """``(*attributes) -> constants`` and ``(V, *constants) -> A V``."""
    live = _live(graph)
    (output,) = graph.find_nodes(op="output")
    uses = [argument for node in graph.nodes if node in live for argument in node.all_input_nodes]
    constants = [node for node in dict.fromkeys(uses) if node not in live]

    before, after = _Part(), _Part()
    for node in graph.nodes:
        if node.op == "placeholder":
            after.input(node)
        elif node.op == "get_attr":
            before.input(node)
    for node in constants:
        after.input(node)
    for node in graph.nodes:
        if node.op == "call_function":
            (after if node in live else before).copy(node)
    return before.module(tuple(constants)), after.module(output.args[0])


class _Part:
    """Some of the nodes of a graph, in their order, with the others they need as inputs."""

    def __init__(self) -> None:
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}

    def input(self, node: fx.Node) -> None:
        self._copies[node] = self._graph.placeholder(f"input_{len(self._copies)}")

    def copy(self, node: fx.Node) -> None:
        self._copies[node] = self._graph.node_copy(node, self._copies.__getitem__)

    def module(self, output: Any) -> fx.GraphModule:
        self._graph.output(fx.map_arg(output, self._copies.__getitem__))
        return fx.GraphModule(torch.nn.Module(), self._graph)


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes to be computed anew for every V: those that depend on it, by value or by memory.

    Memory that is written to is computed anew if the writing depends on V, if it is handed out,
    or if it is read for V before the last writing.
    """
    nodes = list(graph.nodes)
    memories = _memories(nodes)
    written = {node: [memories.of(argument) for argument in _written(node)] for node in nodes}
    live = {node for node in nodes if node.op in ("placeholder", "output")}
    known = -1
    while known < len(live):
        known = len(live)
        live |= {node for node in nodes if not live.isdisjoint(node.all_input_nodes)}
        anew: set[fx.Node] = set()
        read: set[fx.Node] = set()  # for V, up to here
        for node in nodes:
            anew.update(m for m in written[node] if node in live or m in read)
            if node in live:
                read.update(map(memories.of, node.all_input_nodes))
        live |= {n for n in nodes if n.op == "call_function" and memories.of(n) in anew}
    return live


class _Memories:
    """Disjoint sets of nodes that may share memory."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node:
        """The node that stands for all that share memory with ``node``."""
        while node in self._parent:
            node = self._parent[node]
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self.of(a), self.of(b)
        if a is not b:
            self._parent[a] = b


def _memories(nodes: Sequence[fx.Node]) -> _Memories:
    memories = _Memories()
    for node in nodes:
        for argument in _shared(node):
            memories.join(node, argument)
    return memories


def _shared(node: fx.Node) -> list[fx.Node]:
    """The arguments of which the result may be a view."""
    if node.target in (operator.getitem, torch.ops.aten._unsafe_view.default):
        return node.all_input_nodes
    return _annotated(node, lambda alias: alias is not None)


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that are written to, or handed out, which is to the same effect."""
    if node.op == "output":
        return node.all_input_nodes
    return _annotated(node, lambda alias: alias is not None and alias.is_write)


def _annotated(node: fx.Node, wanted: Callable[[Any], bool]) -> list[fx.Node]:
    """The arguments whose annotation in the schema of the operation is as wanted."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    values = [
        given[argument.name]
        for argument in schema.arguments
        if argument.name in given and wanted(argument.alias_info)
    ]
    return [value for value in tree_leaves(values) if isinstance(value, fx.Node)]
