"""Programs as CUDA graphs: recorded once, replayed from a static input to a static output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from torchlinop.errors import CaptureError, OptionError
from torchlinop.traced import Program, first_line

WARM_UP = 3  # runs before a capture, in which libraries choose kernels and allocate workspaces


class Recorder(Protocol):
    """What a device does for a capture; a test may pretend to be one."""

    kind: str  # of devices

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """``(replay, output)``: replaying does the work again, on the memory it was done on."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Inside, nothing else is replayed, on whatever thread or stream."""
        ...


class CudaRecorder:
    """CUDA graphs of one operator, which share one memory pool and take turns on the device."""

    kind = "cuda"

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Of captures: not that of anybody else, as CUDA demands."""
        return torch.cuda.Stream()

    @cached_property
    def _replayed(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Capture on the current device, after a warm-up."""
        stream, current = self._stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                work()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads allocate meanwhile, loaders say, does no harm.
        captured = torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        )
        try:
            with torch.cuda.stream(stream), captured:  # older torch stays on it if a capture fails
                output = work()
        except BaseException:
            self.__dict__.pop("_pool", None)  # a failed capture may never leave its pool
            raise
        return graph.replay, output

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One replay at a time: all read and write the same pool."""
        with self._lock:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._replayed)
            try:
                yield
            finally:  # what was launched before an error still reads the pool
                self._replayed.record(stream)


@dataclass(frozen=True)
class Graph:
    """A recorded program."""

    recorder: Recorder
    program: Program  # whose constants are read
    input: Tensor  # (n, k)
    output: Tensor  # (n, k)
    replay: Callable[[], object]

    def __call__(self, V: Tensor, *constants: Tensor) -> Tensor:
        with torch.cuda.device_of(V), self.recorder.turn():
            self.input.copy_(V)
            if V.is_cuda:  # or its memory, once evicted, may be given away under another stream
                self.input.record_stream(torch.cuda.current_stream())
            self.replay()
            return self.output.clone()


class CudaGraphs:
    """Captures programs, a graph for each batch and width, with all launches in one.

    Memory: the temporary memory of the largest product once for all graphs of an operator, an
    output (n, k) for every graph, and an input (n, k) for every width. Nobody holds these: V is
    copied in, the product is cloned out.
    """

    name = "CUDA graphs"
    option = "cuda_graphs=True"

    def __init__(self) -> None:
        self._recorder: Recorder = CudaRecorder()
        # By shape, for as long as a graph reads them.
        self._inputs: WeakValueDictionary[torch.Size, Tensor] = WeakValueDictionary()

    def refuse_unfit(self, device: torch.device) -> None:
        """Raise OptionError unless the device is one of CUDA."""
        if device.type != self._recorder.kind:
            raise OptionError(
                f"cuda_graphs=True expected an operator on a CUDA device, got one on {device}; "
                "move the model there, or leave it out"
            )

    def __call__(self, program: Program, V: Tensor) -> Program:
        """The program as a graph, which reads the constants where they are.

        Raises:
            CaptureError: the program waits for the device, or calls what cannot be captured.
        """
        static = self._inputs.setdefault(V.shape, torch.empty_like(V))
        with torch.cuda.device_of(V), self._recorder.turn():
            static.copy_(V)
            try:
                replay, output = self._recorder.record(lambda: program(static))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise CaptureError(
                    f"the product cannot be captured as a CUDA graph ({first_line(error)}); leave "
                    "out cuda_graphs"
                ) from error
        return replace(program, run=Graph(self._recorder, program, static, output, replay))

    def __reduce__(self) -> tuple[Any, ...]:
        """Graphs cannot be pickled; they are captured again."""
        return type(self), ()
