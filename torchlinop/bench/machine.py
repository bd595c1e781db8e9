"""What a benchmark ran on: the device, its driver, and the versions of all that took part."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import torchlinop

PACKAGES = (
    "numpy",
    "scipy",
    "triton",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "transformers",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
)


def surroundings(device: torch.device) -> dict[str, Any]:
    """The record that belongs beside every number."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(str(device)),
        **(_of_cuda(device) if device.type == "cuda" else {}),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return facts | {p: version(p) for p in PACKAGES} | {"torchlinop": torchlinop.__version__}


def _of_cuda(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "compute capability": f"{properties.major}.{properties.minor}",
        "device memory in bytes": properties.total_memory,
        "driver": driver(),
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }


def driver() -> str:
    """The version of the NVIDIA driver, as nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    ran = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return (ran.stdout.strip().splitlines() or ["unknown"])[0]


def version(package: str) -> str:
    """The installed version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: str) -> str:
    """The name of a GPU, or of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
