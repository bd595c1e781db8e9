"""The state of a long run in a place that is always whole, and belongs to one problem."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from torchlinop.algorithms.result import optional
from torchlinop.errors import OptionError
from torchlinop.run_store import FileStore
from torchlinop.space import VectorSpace
from torchlinop.tensor_file import intact

_KIND = "checkpoint"


class Checkpoint:
    """A place for the state of one run: tensors, and numbers and strings as JSON has them.

    ``fingerprint`` says of which problem the state is (n, dtype, seed, ...): whatever a run must
    agree in to continue bit by bit. Dtypes and devices are written as strings, integers of numpy
    as integers. The place is a file, or what the ``space`` of the vectors has for it.
    """

    def __init__(
        self, path: str | Path, fingerprint: Mapping[str, Any], space: VectorSpace | None = None
    ) -> None:
        if not isinstance(path, str | PathLike):
            raise OptionError(
                f'expected checkpoint to be a path, got {path!r}; pass "run.safetensors", say'
            )
        self.path = Path(path)
        self.store = FileStore(self.path) if space is None else space.store(path)
        self.fingerprint = json.loads(json.dumps(dict(fingerprint), default=_in_json))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors, on the CPU, and the numbers; None where there is nothing yet.

        Call it before the first product: what would keep ``save`` from writing is refused here.

        Raises:
            OptionError: the checkpoint is of another problem, or none of ours; it could not be
                written, for want of its directory or of a package.
        """
        for package in self.store.packages:
            optional(package)
        self.store.refuse()
        header = self.store.header()
        if header is None:
            return None
        self._refuse_another(header)
        with intact(self.path):
            return self.store.tensors(), header["numbers"]

    def save(
        self,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
        vectors: Collection[str] = (),
        growing: Mapping[str, str] | None = None,
    ) -> None:
        """Replace it, at once: an interruption leaves the old state or the new one.

        ``vectors`` and ``growing`` say which tensors are made of vectors: see `RunStore.save`.
        """
        header = {"kind": _KIND, "of": self.fingerprint, "numbers": dict(numbers)}
        self.store.save(tensors, header, vectors, growing or {})

    @property
    def due(self) -> bool:
        """Whether a save after every step would cost little, as where a step takes long."""
        return self.store.due

    def _refuse_another(self, header: Mapping[str, Any]) -> None:
        if header.get("kind") != _KIND:
            raise OptionError(
                f"expected a checkpoint in {self.path}, got another file of torchlinop; "
                "pass the path of a checkpoint, or of no file"
            )
        with intact(self.path):
            theirs, ours = dict(header["of"]), self.fingerprint
        different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if "algorithm" in different:
            different = ["algorithm"]  # whose options are others
        if different:
            raise OptionError(
                f"checkpoint {self.path} is of {_listed(theirs, different)}, expected "
                f"{_listed(ours, different)}; pass another path, or delete the file"
            )


def _in_json(value: object) -> int | str:
    return int(value) if isinstance(value, Integral) else str(value)


def _listed(fingerprint: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={fingerprint.get(name)}" for name in names)
