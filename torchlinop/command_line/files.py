"""Files that a command writes: refused before the run where they cannot be, and always whole."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlinop.algorithms.result import Result, optional
from torchlinop.articles import kind_of
from torchlinop.errors import OptionError, TorchlinopError


@dataclass(frozen=True)
class Files:
    """The result, its picture, and the state of the run, beside the result until it is done."""

    out: Path | None
    plot: Path | None
    checkpoint: Path | None
    resume: bool
    overwrite: bool

    @classmethod
    def of(cls, options: argparse.Namespace) -> Files:
        """Those that the options name.

        Raises:
            OptionError: one exists and may not be replaced, or cannot be written.
        """
        out, resume = options.out, getattr(options, "resume", False)
        if out is not None:
            _refuse_suffix(out, (".safetensors",))
        saves_state = out is not None and not getattr(options, "no_checkpoint", True)
        files = cls(
            out,
            options.plot,
            out.with_suffix(".checkpoint") if saves_state else None,
            resume,
            options.overwrite,
        )
        files._refuse()
        return files

    def _refuse(self) -> None:
        if self.resume and self.checkpoint is None:
            raise OptionError(
                "--resume goes on from the checkpoint beside --out; pass --out FILE.safetensors, "
                "and leave out --no-checkpoint"
            )
        if self.out is not None:
            optional("safetensors.torch")
        if self.plot is not None:
            _refuse_suffix(self.plot, tuple(sorted(_pictures())))
        self._refuse_existing()
        for path in (self.out, self.plot, self.checkpoint):
            refuse_unwritable(path)

    def _refuse_existing(self) -> None:
        state = self.checkpoint is not None and self.checkpoint.is_file()
        if state and not (self.resume or self.overwrite):
            raise OptionError(
                f"{self.checkpoint} holds an unfinished run; pass --resume to go on with it, or "
                "--overwrite to begin anew"
            )
        if self.resume and not state and self.out is not None and self.out.exists():
            raise OptionError(
                f"{self.out} is finished: there is no {self.checkpoint} to go on from; print it "
                f"by torchlinop show {self.out}, or pass --overwrite to compute it again"
            )
        for path in (self.out, self.plot):
            refuse_existing(path, self.overwrite or (self.resume and state))

    @contextmanager
    def begun(self) -> Iterator[Path | None]:
        """Where to save the state of the run. That of another one comes back if this is refused."""
        old = None
        if self.checkpoint is not None and self.checkpoint.exists() and not self.resume:
            old = self.checkpoint.rename(f"{self.checkpoint}.old")
        try:
            yield self.checkpoint
        except TorchlinopError:
            if old is not None and self.checkpoint is not None:
                os.replace(old, self.checkpoint)
            raise
        if old is not None:
            old.unlink()

    def write(self, result: Result, *, finished: bool) -> None:
        """Save and draw the result; of one that is finished, forget the state of the run."""
        if self.out is not None:
            _replaced(self.out, result.save)
        if self.plot is not None:
            write_plot(self.plot, result)
        if finished and self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)


def write_plot(path: Path, result: Any) -> None:
    """A picture of the result.

    Raises:
        OptionError: matplotlib is not installed, or it has none.
    """
    if not hasattr(result, "plot"):
        raise OptionError(f"{kind_of(result)} has no picture; leave out --plot")
    plt = optional("matplotlib.pyplot")
    plt.switch_backend("Agg")
    ax = result.plot()
    _replaced(path, lambda part: ax.figure.savefig(part, dpi=150, bbox_inches="tight"))
    plt.close(ax.figure)


def refuse_plot(path: Path | None, *, overwrite: bool) -> None:
    """Raise OptionError if there can be no picture in this file."""
    if path is not None:
        _refuse_suffix(path, tuple(sorted(_pictures())))
    refuse_existing(path, overwrite)
    refuse_unwritable(path)


def refuse_existing(path: Path | None, overwrite: bool) -> None:
    """Raise OptionError for a file that is there, unless it may be replaced."""
    if path is not None and path.exists() and not path.is_dir() and not overwrite:
        raise OptionError(f"{path} exists; pass --overwrite, or the name of another file")


def refuse_unwritable(path: Path | None) -> None:
    """Raise OptionError unless a file can be made there."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise OptionError(f"{path} is a folder; give the name of a file")
    if not folder.is_dir():
        raise OptionError(f"no folder {path.parent} to write {path.name} into; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(
            f"cannot write into {folder} ({error.strerror}); give a file in another folder"
        ) from error


def _pictures() -> list[str]:
    """Suffixes that matplotlib writes."""
    figure = optional("matplotlib.figure").Figure()
    return [f".{kind}" for kind in figure.canvas.get_supported_filetypes()]


def _refuse_suffix(path: Path, known: tuple[str, ...]) -> None:
    if path.suffix not in known:
        raise OptionError(
            f"expected a file that ends in {' or '.join(known)}, got '{path}'; name it "
            f"result{'.png' if '.png' in known else known[0]}, say"
        )


def _replaced(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and move it there, so that it is never half of one."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
