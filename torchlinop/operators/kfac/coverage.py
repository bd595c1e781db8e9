"""What of the selected parameters K-FAC has blocks for, and what became of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torchlinop.errors import KFACCoverageError

Policy = Literal["error", "diag", "identity", "skip"]


@dataclass(frozen=True, repr=False)
class Coverage:
    """What of the selected parameters has a K-FAC block, and what became of the rest."""

    entries: int  # covered
    size: int  # n
    tensors: int  # covered
    layers: Mapping[str, str]  # the kind of layer by the name of the module
    missing: Mapping[str, str]  # the reason, by class and name of the parameter
    unused: Sequence[str]  # covered, as their rows are zero: they do not influence the outputs
    policy: Policy  # for these

    @property
    def percent(self) -> int:
        """Rounded down, so that 100 means all."""
        return 100 * self.entries // self.size

    @property
    def summary(self) -> str:
        """A line."""
        return f"K-FAC covers {self.percent} % of the {self.size:,} entries"

    def __repr__(self) -> str:
        lines = [f"{self.summary}, in {self.tensors} tensors"]
        lines += [f"  {name or 'the model itself'}: {kind}" for name, kind in self.layers.items()]
        lines += [f"  zero rows: {name} (without influence)" for name in self.unused]
        policy = f', unsupported="{self.policy}"'
        lines += [f"  not covered: {name} ({why}){policy}" for name, why in self.missing.items()]
        return "\n".join(lines)

    def enforce(self) -> None:
        """Raise KFACCoverageError if something is not covered and nothing was said about it."""
        if self.missing and self.policy == "error":
            listed = [f"{name} ({why})" for name, why in self.missing.items()]
            shown = ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
            raise KFACCoverageError(
                f"{self.summary}; not covered: {shown}. "
                'Choose unsupported="diag", "identity" or "skip".'
            )
