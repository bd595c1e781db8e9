"""An answer in a file: tensors and a JSON header in safetensors; numbers for loggers, tables."""

from __future__ import annotations

import dataclasses
import importlib
import platform
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from torchlinop.articles import with_article
from torchlinop.dtypes import dtype_named, name_of
from torchlinop.errors import OptionError
from torchlinop.parameters import ParameterLayout
from torchlinop.tensor_file import (
    intact,
    layout_as_json,
    layout_from_json,
    read,
    write,
)

_FORMAT = 1


class Result:
    """Mixin of frozen dataclasses: fields are tensors, numbers, strings, tuples of these, None,
    a dtype, a layout of parameters, or another result.

    A subclass says in ``_columns`` which fields of equal length make a table, in ``_parts`` which
    fields are results of which class, and what is what in ``_conventions``.
    """

    _columns: ClassVar[tuple[str, ...]] = ()
    _parts: ClassVar[Mapping[str, type[Result]]] = {}
    _conventions: ClassVar[str] = "vectors are columns"

    # Of itself alone: tensors compared entry by entry have no truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: tensors as they are, all else in its JSON header.

        Raises:
            OptionError: the package safetensors is not installed.
        """
        values = self._values()
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        others = {name: _as_json(v) for name, v in values.items() if name not in tensors}
        environment = {"torch": torch.__version__, "python": platform.python_version()}
        header = {
            "format": _FORMAT,
            "result": type(self).__name__,
            "conventions": self._conventions,
            "environment": environment,
            "fields": others,
        }
        write(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read what ``save`` wrote, with tensors on ``device``.

        Raises:
            OptionError: the file is damaged or holds something else, or the package safetensors
                is not installed.
        """
        tensors, header = read(path, device)
        _refuse_newer(path, header)
        if header.get("result") != cls.__name__ or header.get("format") != _FORMAT:
            raise OptionError(
                f"expected {with_article(cls.__name__)} of format {_FORMAT} in {path}, got "
                f"{with_article(header.get('result', 'file of an operator'))} of format "
                f"{header.get('format')}; load it with the class that saved it"
            )
        return cls._of_file(path, tensors, header)

    @classmethod
    def _of_file(
        cls, path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
    ) -> Self:
        with intact(path):
            fields = {name: _from_json(v) for name, v in header["fields"].items()}
            return cls._of_values(fields | dict(tensors))

    def save_npz(self, path: str | Path) -> None:
        """Write tensors and numbers as NumPy arrays; what NumPy has no type for is left out."""
        arrays = {}
        for name, value in self._values().items():
            if isinstance(value, Tensor):
                wide = value.float() if value.dtype == torch.bfloat16 else value
                arrays[name] = wide.detach().cpu().numpy()
            elif isinstance(value, bool | int | float | str):
                arrays[name] = np.asarray(value)
        np.savez(path, **arrays)  # type: ignore[arg-type]

    def scalars(self) -> dict[str, float]:
        """Numbers by name, for a logger: fields that are numbers, and the entries of columns."""
        numbers = {}
        for name, value in self._values().items():
            if isinstance(value, bool | int | float):
                numbers[name] = float(value)
            elif name in self._columns and isinstance(value, Tensor):
                numbers |= {f"{name}/{i}": float(x) for i, x in enumerate(value.tolist(), 1)}
        return numbers

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, columns and scalars as JSON has them; no vector of length n."""
        plain = {name: _plain(v) for name, v in self._values().items() if _is_plain(v)}
        columns = {name: _listed(getattr(self, name)) for name in self._columns}
        scalars = {name: v for name, v in self.scalars().items() if "/" not in name}
        return {"result": type(self).__name__, **scalars, **plain, **columns}

    def to_dataframe(self) -> Any:
        """The columns as a pandas DataFrame, a row an entry.

        Raises:
            OptionError: pandas is not installed.
        """
        pd = optional("pandas")
        return pd.DataFrame({name: _listed(getattr(self, name)) for name in self._columns})

    def _values(self) -> dict[str, Any]:
        """Fields by name; ``"quadrature.nodes"``, say, for one of a part."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        for part in self._parts:
            inner = values.pop(part)._values()
            values |= {f"{part}.{name}": value for name, value in inner.items()}
        return values

    @classmethod
    def _of_values(cls, values: Mapping[str, Any]) -> Self:
        """The way back."""
        own = {name: value for name, value in values.items() if "." not in name}
        for part, kind in cls._parts.items():
            dot = f"{part}."
            inner = {n.removeprefix(dot): v for n, v in values.items() if n.startswith(dot)}
            own[part] = kind._of_values(inner)
        return cls(**own)


def load_result(path: str | Path, device: torch.device | str = "cpu") -> Result:
    """Read what any result's ``save`` wrote, with tensors on ``device``.

    Raises:
        OptionError: the file is damaged, holds something else, or is of a newer version; or the
            package safetensors is not installed.
    """
    tensors, header = read(path, device)
    _refuse_newer(path, header)
    kind = _kinds(Result).get(header.get("result", ""))
    if kind is None:
        raise OptionError(
            f"expected a saved result in {path}, got a "
            f"{header.get('kind') or header.get('result') or 'file of an operator'}; pass a file "
            "that a result's .save wrote"
        )
    return kind._of_file(path, tensors, header)


def _kinds(kind: type[Result]) -> dict[str, type[Result]]:
    """All classes of results, by their names."""
    found = {kind.__name__: kind}
    for child in kind.__subclasses__():
        found |= _kinds(child)
    return found


def _refuse_newer(path: str | Path, header: Mapping[str, Any]) -> None:
    written = header.get("format")
    if isinstance(written, int) and written > _FORMAT:
        raise OptionError(
            f"{path} was written by a newer version, in format {written}, and this one reads "
            f"format {_FORMAT}; run: pip install --upgrade torchlinop"
        )


def optional(module: str) -> ModuleType:
    """A module of a package that this one works without.

    Raises:
        OptionError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".", maxsplit=1)[0]
        raise OptionError(f"this needs {package}; run: pip install {package}") from error


def _listed(column: Tensor | tuple[Any, ...]) -> list[Any]:
    return column.tolist() if isinstance(column, Tensor) else list(column)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return name_of(value) if isinstance(value, torch.dtype) else value


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": name_of(value)}
    if isinstance(value, ParameterLayout):
        return {"layout": layout_as_json(value)}
    if isinstance(value, tuple):
        return {"tuple": [_as_json(v) for v in value]}
    return value


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "dtype":
        return dtype_named(content)
    if kind == "layout":
        return layout_from_json(content)
    return tuple(_from_json(v) for v in content)
