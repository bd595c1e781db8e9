"""The state of a run on shards: a folder that all ranks write, with vectors by global index."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop.dtypes import dtype_named, name_of
from torchlinop.errors import OptionError
from torchlinop.folder_ranks import FolderRanks
from torchlinop.piece import Piece, in_common, placed
from torchlinop.run_store import LATEST
from torchlinop.tensor_file import intact

_FORMAT = 1
_ANOTHER = "pass another path, or delete the folder"
_WORTH = 2.0  # times what the last save took is what the next one may lose


class Vectors(Protocol):
    """Of a space, what a folder asks of it."""

    @property
    def size(self) -> int: ...
    @property
    def local_size(self) -> int: ...
    def agree(self, flag: bool) -> bool: ...


class CheckpointFolder:
    """A folder for the state of one run, which any number of ranks can go on from.

    A save is a subfolder by torch.distributed.checkpoint, in which every rank writes the entries
    that it owns, then ``latest.json``, which names it, is replaced: an interruption leaves the old
    state or the new one. Of vectors that were there before, the files stay.
    """

    packages: tuple[str, ...] = ()

    def __init__(
        self,
        path: Path,
        space: Vectors,
        pieces: tuple[Piece, ...],
        owned: int,
        group: dist.ProcessGroup | None,
        *,
        alone: bool,
    ) -> None:
        self.path, self.space, self.pieces = path, space, pieces
        self._ranks = FolderRanks(group, alone)
        self._owned = [own for own in placed(pieces) if own[1] < owned]
        self._latest: dict[str, Any] = {}
        self._everywhere: list[Piece] = []  # that are saved, of all ranks
        self._took, self._ended = 0.0, time.perf_counter()

    def refuse(self) -> None:
        """Raise OptionError for a path that cannot become such a folder.

        Raises:
            OptionError: it is a file, or a folder of something else; its parent does not exist.
        """
        with self._ranks.agreed(f"cannot look into {self.path}", _ANOTHER):
            if not self.path.parent.is_dir() or (self.path.exists() and not self._is_ours()):
                raise OptionError(
                    "expected checkpoint to be a folder of such a run, or of none yet, in a "
                    f"directory that exists, got {self.path}; vectors on several ranks are kept in "
                    "a folder: pass the path of one"
                )

    def _is_ours(self) -> bool:
        if not self.path.is_dir():
            return False
        names = [entry.name for entry in self.path.iterdir()]
        return all(name.isdigit() or name.startswith(LATEST) for name in names)

    def header(self) -> dict[str, Any] | None:
        """The header of the last save; None where there is none.

        Raises:
            OptionError: some ranks do not see the folder, it is damaged, or of a newer version.
        """
        latest = self.path / LATEST
        with self._ranks.agreed(f"cannot look into {self.path}", _ANOTHER):
            here = latest.exists()
        if not self.space.agree(here):
            return None
        if self.space.agree(not here):
            raise OptionError(
                f"some ranks see a checkpoint in {self.path}, and others do not; pass a path on a "
                "file system that all ranks share"
            )
        with self._ranks.agreed(f"{latest} is damaged", _ANOTHER):
            self._latest = json.loads(latest.read_text())
            header: dict[str, Any] = self._latest["header"]
            if self._latest["format"] > _FORMAT:
                raise OptionError(
                    f"{self.path} was written by a newer version, in format "
                    f"{self._latest['format']}, and this one reads format {_FORMAT}; "
                    "run: pip install --upgrade torchlinop"
                )
        return header

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the last save, on the CPU; of vectors, the entries that this rank holds.

        Raises:
            OptionError: the folder is damaged.
        """
        with intact(self.path):
            saved = [Piece.of_json(written) for written in self._latest["pieces"]]
            if sum(piece.numel for piece in saved) != self.space.size:
                raise ValueError(f"its pieces are not those of {self.space.size:,} entries")
            small = {
                name: torch.empty(shape, dtype=dtype_named(dtype))
                for name, (dtype, shape) in self._latest["small"].items()
            }
            self._ranks.read(
                self.path / self._latest["folder"],
                {f"small/{name}": t for name, t in small.items()},
            )
            vectors = {
                name: self._vectors(name, written, saved)
                for name, written in self._latest["vectors"].items()
            }
        if saved != self._all_pieces():
            # What is saved next is saved anew, in the pieces of now.
            for written in self._latest["vectors"].values():
                written["label"] = None
        return small | vectors

    def _vectors(self, name: str, written: Mapping[str, Any], saved: list[Piece]) -> Tensor:
        """(k, local_size, ...) of what all ranks had saved."""
        dtype, tail = dtype_named(written["dtype"]), written["tail"]
        k = written["parts"][-1][2]
        rows = torch.zeros(k, self.space.local_size, *tail, dtype=dtype)
        overlaps = {
            i: there
            for i, piece in enumerate(saved)
            for there in [list(in_common(piece, self.pieces))]
            if there
        }
        for folder, start, stop in written["parts"]:
            found = {
                f"{name}/{i}": torch.empty(stop - start, saved[i].numel, *tail, dtype=dtype)
                for i in overlaps
            }
            self._ranks.read(self.path / folder, found)
            for i, there in overlaps.items():
                for source, target in there:
                    rows[start:stop, target] = found[f"{name}/{i}"][:, source]
        return rows

    def save(
        self,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
        vectors: Collection[str],
        growing: Mapping[str, str],
    ) -> None:
        """Replace what is there: a collective call.

        Raises:
            OptionError: the folder cannot be written, on any rank.
        """
        began = time.perf_counter()
        folder = f"{int(self._latest.get('folder', 0)) + 1:06d}"
        pieces = self._all_pieces()
        numbers = {piece: i for i, piece in enumerate(pieces)}
        state, written = {}, {}
        for name in (name for name in tensors if name in vectors):
            rows, label = tensors[name], growing.get(name)
            parts = self._parts_there(name, label)
            start = parts[-1][2] if parts else 0
            if start < len(rows):
                parts.append([folder, start, len(rows)])
            for piece, place in self._owned:
                own = rows[start:, place : place + piece.numel]
                state[f"{name}/{numbers[piece]}"] = own.detach().cpu().contiguous()
            written[name] = {
                "dtype": name_of(rows.dtype),
                "tail": list(rows.shape[2:]),
                "label": label,
                "parts": parts,
            }
        small = {name: t for name, t in tensors.items() if name not in vectors}
        if self._ranks.first:
            # Cloned, as a view would be written with all that it is a view of.
            state |= {f"small/{name}": t.detach().cpu().clone() for name, t in small.items()}
        latest = {
            "format": _FORMAT,
            "header": dict(header),
            "folder": folder,
            "pieces": [[piece.offset, piece.shape, piece.held] for piece in pieces],
            "vectors": written,
            "small": {name: [name_of(t.dtype), list(t.shape)] for name, t in small.items()},
        }
        self._write(folder, state, latest)
        self._latest = json.loads(json.dumps(latest))
        self._ended = time.perf_counter()
        self._took = self._ended - began

    @property
    def due(self) -> bool:
        """Whether as much time has gone by as makes a save of the new vectors cheap."""
        return self.space.agree(time.perf_counter() - self._ended >= _WORTH * self._took)

    def _parts_there(self, name: str, label: str | None) -> list[list[Any]]:
        before = self._latest.get("vectors", {}).get(name)
        if label is None or before is None or before["label"] != label:
            return []
        return [list(part) for part in before["parts"]]

    def _all_pieces(self) -> list[Piece]:
        """Those that every rank saves, the same list on all of them."""
        if not self._everywhere:
            own = [piece for piece, _ in self._owned if piece.numel]
            self._owned = [(piece, place) for piece, place in self._owned if piece.numel]
            self._everywhere = [piece for pieces in self._ranks.gathered(own) for piece in pieces]
        return self._everywhere

    def _write(self, folder: str, state: dict[str, Any], latest: dict[str, Any]) -> None:
        if self._ranks.first:
            shutil.rmtree(self.path / folder, ignore_errors=True)  # of a save that was interrupted
        self.space.agree(False)  # none writes there before it is gone
        room = "pass a path with room, on a file system that all ranks share"
        with self._ranks.agreed(f"cannot write {self.path}", room):
            self._ranks.write(self.path / folder, state)
            if self._ranks.first:
                part = self.path / f"{LATEST}.part"
                part.write_text(json.dumps(latest))
                os.replace(part, self.path / LATEST)
        if self._ranks.first:
            used = {part[0] for w in latest["vectors"].values() for part in w["parts"]} | {folder}
            with suppress(OSError):
                for entry in self.path.iterdir():
                    if entry.name.isdigit() and entry.name not in used:
                        shutil.rmtree(entry, ignore_errors=True)


def whole_folder(path: Path, space: Vectors) -> CheckpointFolder:
    """The folder, for a process with whole vectors: alone, or as one of a group's replicas."""
    group: dist.ProcessGroup | None = getattr(space, "group", None)
    alone = group is None
    owned = space.size if alone or dist.get_rank(group) == 0 else 0
    everything = (Piece.whole(0, (space.size,)),)
    return CheckpointFolder(path, space, everything, owned, group, alone=alone)
