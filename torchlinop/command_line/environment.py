"""The machine and the packages, as a doctor reports them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

import torchlinop
from torchlinop.memory import GIB, free_bytes

_NEEDED = ("torch", "numpy", "scipy")
# Packages that some things need, by the names they are imported by, and what installs them.
_OPTIONAL = {
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
    "pandas": "pandas",
    "sklearn": "scikit-learn",
    "transformers": "transformers",
    "cupy": '"torchlinop[cuda13]"',
}


def environment() -> dict[str, str]:
    """Versions, devices with their free memory, and which optional packages there are."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _NEEDED]
    there = [name for name in _OPTIONAL if importlib.util.find_spec(name)]
    missing = [_OPTIONAL[name] for name in _OPTIONAL if name not in there]
    return {
        "versions": ", ".join(
            (
                f"torchlinop {torchlinop.__version__}",
                f"Python {platform.python_version()}",
                *versions,
            )
        ),
        "devices": ", ".join(_devices()),
        "packages": ", ".join(there)
        + (f"; to have more: pip install {' '.join(missing)}" if missing else ""),
    }


def _devices() -> list[str]:
    cpu = f"cpu ({torch.get_num_threads()} threads, {_free('cpu')})"
    return [cpu] + [
        f"cuda:{i} ({torch.cuda.get_device_name(i)}, {_free(f'cuda:{i}')})"
        for i in range(torch.cuda.device_count())
    ]


def _free(device: str) -> str:
    return f"{free_bytes(torch.device(device)) / GIB:.1f} GiB free"
