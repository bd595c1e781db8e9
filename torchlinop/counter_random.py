"""Uniform random numbers by their position: a hash of (seed, stream, sample, entry), no state."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# The mixing function of splitmix64 (Steele, Lea, Flood, Fast splittable pseudorandom number
# generators, OOPSLA 2014), in 64-bit integers that wrap around.
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def uniform(shape: torch.Size, seed: int, stream: int, first: int, device: torch.device) -> Tensor:
    """Float64 numbers in (0, 1) of this shape, whose first axis counts samples from ``first``.

    Each depends on the seed, the stream, the number of its sample and its place in the sample
    alone: not on the batch, the device, or what was drawn before.
    """
    keys = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(2, np.uint64)
    key, second = (int(k) for k in keys.astype(np.int64))
    samples = torch.arange(first, first + shape[0], device=device)
    entries = torch.arange(math.prod(shape[1:]), device=device)
    of_sample = _mixed(samples * _GOLDEN + key)[:, None]
    bits = _mixed(of_sample + entries * _GOLDEN + second)
    # The 52 highest bits, in the middle of their intervals: neither 0 nor 1.
    return ((_shifted(bits, 12).double() + 0.5) * 2.0**-52).reshape(shape)


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shifted(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """A logical shift to the right: the sign bit is not copied in."""
    return torch.bitwise_and(z >> by, 2 ** (64 - by) - 1)
