"""Kept products run as programs: traced once for every width, then handed to what speeds them up.

A step (``torch.compile``, a CUDA graph) makes a program of a program and knows nothing of models.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlinop.derivatives import LinearMap
from torchlinop.errors import TorchlinopWarning, warn_caller
from torchlinop.traced import Program, Run, first_line, refuse_other_product, traced

WIDTHS = 4  # a solver's block, its single vectors, and what is left of a block


class Step(Protocol):
    """Makes a faster program of a program."""

    name: str  # for people
    option: str  # the keyword that asks for it

    def refuse_unfit(self, device: torch.device) -> None:
        """Raise OptionError if the step cannot be taken on this device."""
        ...

    def __call__(self, program: Program, V: Tensor) -> Program: ...


class Programs:
    """A linear map that is run as one program for every width, built at its first block.

    The last few widths are kept. A program is compared with the map on one further block.
    """

    def __init__(self, product: LinearMap, steps: Sequence[Step]) -> None:
        self._product = product
        self._steps = steps
        self._programs: OrderedDict[int, Program] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, V: Tensor, *, last: bool = False) -> Tensor:
        V = V.mT.contiguous().mT  # the memory layout that programs are made for
        with self._lock:
            width = V.shape[1]
            program = self._programs.pop(width, None) or self._built(V)
            self._programs[width] = program
            if len(self._programs) > WIDTHS:
                self._programs.popitem(last=False)
        return program(V)

    def _built(self, V: Tensor) -> Program:
        program = traced(self._product, V)
        for step in self._steps:
            program = step(program, V)
        refuse_other_product(program, self._product, V)
        return program


def as_programs(product: LinearMap, steps: tuple[Step, ...]) -> LinearMap:
    """``product`` run as programs, if there are steps to be taken."""
    return Programs(product, steps) if steps else product


@dataclass
class Compiled:
    """``torch.compile`` of programs on a GPU; batches whose programs read alike share the work.

    On a CPU the traced program is run as it is. Measured with one thread on a 64-256-256-10 MLP
    and a GPT-2 of four layers, inductor saves 11 % and nothing of what tracing leaves, for 7 and
    113 seconds of compilation, and it needs a C++ compiler.
    """

    compile: Callable[[Run], Run] = field(default=lambda run: torch.compile(run, dynamic=False))
    kinds: tuple[str, ...] = ("cuda",)  # of devices on which it pays
    name = "compiled"
    option = "compile=True"
    _runs: dict[str, Run] = field(default_factory=dict, init=False, repr=False)
    _failed: bool = field(default=False, init=False, repr=False)

    def refuse_unfit(self, device: torch.device) -> None:
        """Any device will do."""

    def __call__(self, program: Program, V: Tensor) -> Program:
        if self._failed or V.device.type not in self.kinds:
            return program
        code = str(getattr(program.run, "code", id(program.run)))
        run = self._runs.get(code) or self.compile(program.run)
        try:
            run(V, *program.constants)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises
            self._failed = True
            warn_caller(
                f"torch.compile failed ({type(error).__name__}: {first_line(error)}); the traced "
                "products are run as they are. Install a compiler (Triton, or one for C++), or "
                "leave out compile",
                TorchlinopWarning,
            )
            return program
        self._runs[code] = run
        return replace(program, run=run)

    def __reduce__(self) -> tuple[Any, ...]:
        """Compiled code cannot be pickled; it is made again."""
        return type(self), ()
