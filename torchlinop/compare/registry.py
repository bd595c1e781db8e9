"""Solvers by name, registered by a decorator, with what they can do."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch

from torchlinop.articles import with_article
from torchlinop.errors import OptionError
from torchlinop.operators.base import CurvatureOperator

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Candidate:
    """A solver, and what has to be known of it beforehand."""

    name: str
    solve: Callable[..., Any] = field(repr=False)  # (operator, request) -> answer
    which: frozenset[str] = frozenset({"LA", "SA", "LM"})
    symmetric: bool = True  # for symmetric matrices only
    on_host: bool = True  # may work in NumPy: its memory is traced
    requires: tuple[str, ...] = ()  # packages, as they are imported
    budgeted: bool = True  # can be told how many products to take
    own_cost: bool = False  # takes a fixed number of products, whatever the budget
    max_size: int | None = None
    cuda: bool = False  # for matrices on a CUDA device

    @property
    def family(self) -> str:
        """The library: the first word of the name."""
        return self.name.split()[0]

    def missing(self) -> str:
        """The package that is not installed, if one is not."""
        absent = [p for p in self.requires if importlib.util.find_spec(p.partition(".")[0]) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""

    def unsuited(self, A: CurvatureOperator, which: str) -> str:
        """Why it is not for this matrix and end, if it is not; ``which=""`` asks for no end."""
        if which and which not in self.which:
            return f"finds {', '.join(sorted(self.which))}, not {which}"
        if self.max_size is not None and A.size > self.max_size:
            return f"for n up to {self.max_size:,}"
        if self.cuda and A.device.type != "cuda":
            return "for matrices on a CUDA device"
        if A.dtype in (torch.float16, torch.bfloat16) and self.family != "torchlinop":
            return f"not for {A.dtype}"
        return ""


Wanted = str | Callable[..., Any] | Candidate


class Registry:
    """All solvers of one kind. Calling it gives the decorator that adds one.

    Example:
        >>> from torchlinop.compare import eigensolver
        >>> @eigensolver("dense, by hand")
        ... def by_hand(A, request):
        ...     return torch.linalg.eigh(A.to_dense())
        >>> eigensolver.remove("dense, by hand")
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, Candidate] = {}

    def __call__(
        self,
        name: str,
        *,
        which: str | Collection[str] = ("LA", "SA", "LM"),
        requires: str | Iterable[str] = (),
        **facts: Any,
    ) -> Callable[[Function], Function]:
        """Register the function below under ``name``; it is returned as it is.

        Args:
            name: shown in tables; its first word is the library, and gives the colour.
            which: the ends it can find.
            requires: packages it needs; where they are missing it is left out.
            facts: symmetric, on_host, budgeted, own_cost, max_size, cuda, as of Candidate.
        """
        packages = (requires,) if isinstance(requires, str) else tuple(requires)
        ends = frozenset({which} if isinstance(which, str) else which)

        def register(solve: Function) -> Function:
            self.add(Candidate(name, solve, ends, requires=packages, **facts))
            return solve

        return register

    def add(self, candidate: Candidate) -> None:
        """Put it last. A name of ours is not given away; one's own may be defined again."""
        if not candidate.name.strip():
            raise OptionError(
                f"expected a name for the {self.kind}, got none; its first word is the library"
            )
        known = self._known.get(candidate.name)
        ours = known is not None and known.solve.__module__.startswith("torchlinop.")
        if ours and not candidate.solve.__module__.startswith("torchlinop."):
            raise OptionError(
                f"{candidate.name!r} is the name of {with_article(self.kind)} of "
                "torchlinop.compare; choose another"
            )
        self._known[candidate.name] = candidate

    def remove(self, name: str) -> None:
        """Forget a solver. Raises OptionError if there is none of this name."""
        self._named(name)
        del self._known[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._known)

    def select(self, wanted: Iterable[Wanted] | None) -> list[Candidate]:
        """All, or those given as names, patterns such as ``"scipy*"``, or functions.

        Raises:
            OptionError: a name that is not known; the message lists those that are.
        """
        if wanted is None:
            return list(self._known.values())
        items = [wanted] if isinstance(wanted, str) else list(wanted)
        chosen = [c for item in items for c in self._of(item)]
        return list(_told_apart({(c.name, id(c.solve)): c for c in chosen}.values()))

    def _of(self, item: Wanted) -> list[Candidate]:
        if isinstance(item, Candidate):
            return [item]
        if isinstance(item, str):
            matching = [c for name, c in self._known.items() if fnmatchcase(name, item)]
            return matching or [self._named(item)]
        if not callable(item):
            raise OptionError(
                f"expected the name of {with_article(self.kind)} or a function, got {item!r}; "
                f"known: {', '.join(self.names)}"
            )
        own = [c for c in self._known.values() if c.solve is item]
        return own or [Candidate(getattr(item, "__name__", repr(item)), item)]

    def _named(self, name: str) -> Candidate:
        if name not in self._known:
            raise OptionError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names)}")
        return self._known[name]


def _told_apart(chosen: Iterable[Candidate]) -> Iterator[Candidate]:
    """Other solvers of the same name, as two lambdas have, are numbered."""
    seen: Counter[str] = Counter()
    for candidate in chosen:
        seen[candidate.name] += 1
        n = seen[candidate.name]
        yield candidate if n == 1 else replace(candidate, name=f"{candidate.name} ({n})")


eigensolver = Registry("eigensolver")
trace_estimator = Registry("trace estimator")
density_estimator = Registry("density estimator")
linear_solver = Registry("linear solver")
