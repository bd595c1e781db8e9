"""The spectrum of a model's curvature in one call: its ends, and what is read from them."""

from torchlinop.spectrum.by_name import create_operator
from torchlinop.spectrum.compute import compute_spectrum, lanczos_algorithm
from torchlinop.spectrum.config import LanczosConfig
from torchlinop.spectrum.result import SpectrumResult

__all__ = [
    "LanczosConfig",
    "SpectrumResult",
    "compute_spectrum",
    "create_operator",
    "lanczos_algorithm",
]
