"""The command line: ``python -m torchlinop.bench gpu --out DIR``, or ``scale --out DIR``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from torchlinop.bench.gpu import CHOICES, Request, run
from torchlinop.bench.gpu_stages import STAGES
from torchlinop.bench.scale import run as measure_scale
from torchlinop.bench.worker import work
from torchlinop.errors import OptionError


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    made = argparse.ArgumentParser(prog="python -m torchlinop.bench", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    gpu = commands.add_parser("gpu", help="test and measure the library on a GPU")
    gpu.add_argument("--out", type=Path, required=True, help="directory for gpu.json and gpu.md")
    gpu.add_argument("--minutes", type=float, default=8.0, help="all of it stops then (8)")
    gpu.add_argument(
        "--only", nargs="+", choices=CHOICES, default=CHOICES, metavar="STAGE",
        help=f"some of: {', '.join(CHOICES)}",
    )  # fmt: skip
    scale = commands.add_parser("scale", help="count what crosses ranks, on this CPU")
    scale.add_argument("--out", type=Path, required=True, help="directory for scale.json, scale.md")
    scale.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4], help="world sizes (1 2 4)"
    )
    worker = commands.add_parser("worker", help="run stages in this process, as gpu starts it")
    worker.add_argument("stages", nargs="+", choices=STAGES)
    worker.add_argument("--seconds", type=float, required=True)
    worker.add_argument("--records", type=Path, required=True, help="a file of JSON lines")
    for command in (gpu, worker):
        command.add_argument("--device", type=torch.device, default=torch.device("cuda"))
        command.add_argument(
            "--tiny", action="store_true",
            help="tiny models: a rehearsal, whose numbers mean nothing",
        )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, and run."""
    made = parser()
    asked = made.parse_args(arguments)
    if asked.command == "worker":
        work(asked.stages, asked.device, asked.tiny, asked.seconds, asked.records)
        return
    if asked.command == "scale":
        measure_scale(asked.out, asked.ranks)
        print((asked.out / "scale.md").read_text())
        return
    # A time limit from outside ends the processes started here too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        request = Request(asked.out, asked.device, asked.tiny, asked.minutes, asked.only)
    except OptionError as error:
        made.error(str(error))
    run(request)
    print((asked.out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
