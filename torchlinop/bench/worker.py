"""The process that runs stages one after the other, and writes each record when it is known."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from torchlinop.bench.clock import Clock, shares
from torchlinop.bench.gpu_stages import STAGES
from torchlinop.bench.peaks import free
from torchlinop.bench.records import Record, append
from torchlinop.bench.stages import Setting, Stage

BEGUN, ENDED = "begun", "ended"


def ending(name: str, status: str, reason: str, seconds: float | None = None) -> Record:
    """What is written when a stage has ended, and how long it took, if that is known."""
    facts = {"status": status, "reason": reason, "seconds": seconds}
    return {"stage": name, "event": ENDED, **facts}


def work(
    names: Sequence[str], device: torch.device, tiny: bool, seconds: float, records: Path
) -> None:
    """Run the stages of these names in at most about so many seconds."""
    warnings.filterwarnings("ignore")  # of the peers and of torch
    # Else what is merely traced would be reported as compiled.
    warnings.filterwarnings("error", "torch.compile failed")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    stages = [STAGES[name] for name in names]
    clocks = shares([stage.weight for stage in stages], Clock.of(seconds))
    for stage, clock in zip(stages, clocks, strict=True):
        append(records, {"stage": stage.name, "event": BEGUN, "seconds": clock.left})
        start = time.monotonic()
        status, reason = _performed(stage, Setting(device, tiny, clock), records)
        took = time.monotonic() - start
        append(records, ending(stage.name, status, reason, took))


def _performed(stage: Stage, setting: Setting, records: Path) -> tuple[str, str]:
    free(setting.device)
    try:
        for record in stage.run(setting):
            append(records, {"section": stage.section, **record})
    except Exception as error:  # one stage must not cost the next ones
        return "failed", f"{type(error).__name__}: {error}"[:300]
    return "done", ""
