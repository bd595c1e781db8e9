"""The state of a long run in a file that is always whole, and belongs to one problem."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor

from torchlinop.algorithms.result import optional
from torchlinop.errors import OptionError
from torchlinop.tensor_file import intact, read, write

_KIND = "checkpoint"


class Checkpoint:
    """A file for the state of one run: tensors, and numbers and strings as JSON has them.

    ``fingerprint`` says of which problem the state is (n, dtype, seed, ...): whatever a run must
    agree in to continue bit by bit. Dtypes and devices are written as strings, integers of numpy
    as integers.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.fingerprint = json.loads(json.dumps(dict(fingerprint), default=_in_json))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors, on the CPU, and the numbers; None where there is no file yet.

        Call it before the first product: what would keep ``save`` from writing is refused here.

        Raises:
            OptionError: the file is of another problem, or none of ours; it could not be written,
                for want of its directory or of the package safetensors.
        """
        optional("safetensors.torch")
        if not self.path.parent.is_dir():
            raise OptionError(
                f"expected checkpoint to be a file in a directory that exists, got {self.path}; "
                f"make {self.path.parent} first"
            )
        if not self.path.exists():
            return None
        tensors, header = read(self.path, "cpu")
        self._refuse_another(header)
        with intact(self.path):
            return tensors, header["numbers"]

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Replace the file, at once: an interruption leaves the old state or the new one."""
        header = {"kind": _KIND, "of": self.fingerprint}
        part = self.path.with_name(f"{self.path.name}.part")
        try:
            write(part, tensors, header | {"numbers": dict(numbers)})
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)

    def _refuse_another(self, header: Mapping[str, Any]) -> None:
        if header.get("kind") != _KIND:
            raise OptionError(
                f"expected a checkpoint in {self.path}, got another file of torchlinop; "
                "pass the path of a checkpoint, or of no file"
            )
        with intact(self.path):
            theirs, ours = dict(header["of"]), self.fingerprint
        different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if different:
            raise OptionError(
                f"checkpoint {self.path} is of {_listed(theirs, different)}, expected "
                f"{_listed(ours, different)}; pass another path, or delete the file"
            )


def _in_json(value: object) -> int | str:
    return int(value) if isinstance(value, Integral) else str(value)


def _listed(fingerprint: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={fingerprint.get(name)}" for name in names)
