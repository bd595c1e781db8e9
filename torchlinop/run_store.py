"""Where the state of a run is kept: a file here, a folder where vectors are on several ranks."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from torchlinop.errors import OptionError
from torchlinop.tensor_file import read, write

Tensors = dict[str, Tensor]
LATEST = "latest.json"  # by which a folder is known, and which names what was saved last in it


class RunStore(Protocol):
    """Keeps named tensors and a header in JSON; always whole, the old state or the new one."""

    packages: tuple[str, ...]  # modules that it cannot do without

    def refuse(self) -> None:
        """Raise OptionError for what would keep ``save`` from writing."""
        ...

    def header(self) -> dict[str, Any] | None:
        """The header of the last save; None where there is none."""
        ...

    def tensors(self) -> Tensors:
        """The tensors of the last save, on the CPU; of vectors, the entries held here."""
        ...

    def save(
        self,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
        vectors: Collection[str],
        growing: Mapping[str, str],
    ) -> None:
        """Replace what is there.

        Tensors named in ``vectors`` are (k, n, ...), of vectors of the space. Those in
        ``growing`` have the same rows as in the last save, and new ones behind, as long as their
        label is the same.
        """
        ...

    @property
    def due(self) -> bool:
        """Whether a save now would cost little next to what it keeps from being lost."""
        ...


class FileStore:
    """One safetensors file."""

    packages: tuple[str, ...] = ("safetensors.torch",)
    due = False  # such a save is one of everything

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: Tensors = {}

    def refuse(self) -> None:
        if not self.path.parent.is_dir():
            raise OptionError(
                f"expected checkpoint to be a file in a directory that exists, got {self.path}; "
                f"make {self.path.parent} first"
            )

    def header(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        self._found, header = read(self.path, "cpu")
        return header

    def tensors(self) -> Tensors:
        found, self._found = self._found, {}
        return found

    def save(
        self,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
        vectors: Collection[str],
        growing: Mapping[str, str],
    ) -> None:
        # Replicas that run the same may all write the same file.
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            write(part, tensors, header)
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
