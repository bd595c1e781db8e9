"""Runs a function on every rank of a process group (gloo, CPU) and gives back what each returned.

The processes are forked from one server that has imported what is slow to import: 2 ranks take less
than half a second to start. Arguments and results are pickled, so functions are those of a module.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import multiprocessing.connection
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(  # those that are not installed are passed over
    [
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "scipy.sparse.linalg",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "torchlinop.distributed",
        "torchlinop.testing.gallery",
    ]
)


class RankFailedError(Exception):
    """What was raised on a rank: ``errors[rank]`` is (name of the type, message, traceback)."""

    def __init__(self, errors: dict[int, tuple[str, str, str]]) -> None:
        self.errors = errors
        written = [f"rank {r}: {kind}: {message}" for r, (kind, message, _) in errors.items()]
        traces = [trace for _, _, trace in errors.values()]
        super().__init__("\n".join([*written, *traces]))


class RankDiedError(Exception):
    """A rank ended without a result: it was killed, or did not end in time."""


def on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60, **keywords: Any
) -> list[Any]:
    """``[function(*args, **keywords) on rank r for r in range(world_size)]``.

    A collective that waits longer than ``timeout`` seconds fails.

    Raises:
        RankFailedError: a rank raised. All ranks have ended by then.
        RankDiedError: a rank gave no answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        group = {
            "init_method": f"file://{Path(folder) / 'store'}",
            "world_size": world_size,
            "timeout": datetime.timedelta(seconds=timeout),
        }
        call = pickle.dumps((function, args, keywords))
        ranks = [_start(call, rank=rank, **group) for rank in range(world_size)]
        try:
            answers = [_answer(connection, timeout) for _, connection in ranks]
        finally:
            for process, connection in ranks:
                connection.close()
                process.join(5)
                process.kill()
    errors = {rank: answer[1:] for rank, answer in enumerate(answers) if answer[0] == "raised"}
    if errors:
        raise RankFailedError(errors)
    missing = [rank for rank, answer in enumerate(answers) if answer[0] == "died"]
    if missing:
        raise RankDiedError(f"no answer from ranks {missing}")
    return [answer[1] for answer in answers]


def failures(world_size: int, function: Callable[..., Any], *args: Any, **keywords: Any) -> list:
    """(name of the type, message) of what every rank raised; None for one that did not."""
    try:
        on_ranks(world_size, function, *args, **keywords)
    except RankFailedError as error:
        return [
            error.errors[rank][:2] if rank in error.errors else None for rank in range(world_size)
        ]
    return [None] * world_size


def _start(call: bytes, **group: Any) -> tuple:
    here, there = _processes.Pipe()
    process = _processes.Process(target=_run, args=(call, there), kwargs=group, daemon=True)
    process.start()
    there.close()
    return process, here


def _run(call: bytes, connection: multiprocessing.connection.Connection, **group: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group("gloo", **group)
        function, args, keywords = pickle.loads(call)
        answer = pickle.dumps(("returned", function(*args, **keywords)))
    except BaseException as error:  # of any kind: the parent names it
        answer = pickle.dumps(("raised", type(error).__name__, str(error), traceback.format_exc()))
    connection.send_bytes(answer)
    with contextlib.suppress(EOFError):
        connection.recv_bytes()  # ends when all have answered: peers may still talk to it


def _answer(connection: multiprocessing.connection.Connection, timeout: float) -> tuple:
    try:
        if not connection.poll(2 * timeout):
            return ("died",)
        return tuple(pickle.loads(connection.recv_bytes()))
    except EOFError:
        return ("died",)
