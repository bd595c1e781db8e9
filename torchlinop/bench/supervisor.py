"""Processes of a benchmark under a time limit: one that hangs or dies costs its own stage alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from torchlinop.bench.clock import Clock
from torchlinop.bench.records import append, read
from torchlinop.bench.worker import BEGUN, ENDED, ending

POLL = 0.2  # seconds
PATIENCE = 10.0  # seconds beyond its share after which a stage is stopped
KILLED = "stopped"


def run_limited(
    command: Sequence[str],
    log: Path,
    late: Callable[[], bool],
    *,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> int | None:
    """The exit status of a process whose output goes to ``log``; None if it was stopped as late."""
    with (
        log.open("ab") as output,
        _process(command, output, cwd=cwd, env=environment) as process,
    ):
        while process.poll() is None:
            if late():
                return None
            time.sleep(POLL)
        return process.returncode


@contextmanager
def _process(
    command: Sequence[str], output: IO[bytes], **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """With all that it starts, it ends with the block at the latest."""
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def supervise(
    names: Sequence[str],
    command: Callable[[Sequence[str], float], Sequence[str]],
    *,
    records: Path,
    log: Path,
    total: Clock,
    report: Callable[[], object],
) -> None:
    """Run all stages; ``report`` is called whenever one has ended.

    ``command(names, seconds)`` starts a worker. Where it dies or hangs, the stage is written off,
    and another worker starts with the next one.
    """
    left = list(names)
    while left and not total.spent:
        watch = Watch(records, total, report)
        status = run_limited(command(left, total.left), log, watch.late)
        watch.late()
        begun = watch.begun or left[0]
        if begun not in watch.ended:
            reason = "it took too long" if status is None else f"its process ended with {status}"
            append(records, ending(begun, KILLED, reason))
            watch.ended.append(begun)
        left = left[left.index(watch.ended[-1]) + 1 :]
        report()
    for name in left:
        append(records, ending(name, KILLED, "no time was left"))


class Watch:
    """Reads what a worker writes."""

    def __init__(self, records: Path, total: Clock, report: Callable[[], object]) -> None:
        self.records = records
        self.total = total
        self.report = report
        self.begun: str | None = None
        self.ended: list[str] = []
        self._size = 0
        self._seen = len(read(records))
        self._limit = total

    def late(self) -> bool:
        """Whether the stage that runs now should be stopped."""
        for record in self._news():
            if record.get("event") == BEGUN:
                self.begun = record["stage"]
                self._limit = Clock.of(record["seconds"] + PATIENCE)
            elif record.get("event") == ENDED:
                self.ended.append(record["stage"])
                self.report()
        return self._limit.spent or self.total.spent

    def _news(self) -> list[dict[str, Any]]:
        size = self.records.stat().st_size if self.records.exists() else 0
        if size == self._size:
            return []
        self._size = size
        found = read(self.records)
        news, self._seen = found[self._seen :], len(found)
        return news
