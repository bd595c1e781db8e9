"""The global random states of Python, NumPy and torch, put back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the states of Python, NumPy, torch's CPU and ``device`` return."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def preserved_generators(loader: object) -> Iterator[None]:
    """The same for the generators that a DataLoader and its samplers have of their own."""
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    found = [getattr(holder, "generator", None) for holder in (loader, *samplers)]
    states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def reseed(seed: int, device: torch.device) -> None:
    """Seed Python, NumPy, torch's CPU and ``device``, and no other device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
