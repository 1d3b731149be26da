"""A claim of a paper, as a config's ``claims`` spells it; ``tasks/render/claims.py`` holds it against the records."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

CLAIM_KINDS = ("ratio", "crossing")


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper that one number, computed from records, bears out or does not.

    A ``ratio`` is ``metric`` of the system ``of`` over that of the system ``over``, where the parameters are as
    ``where`` says; the paper's is ``paper``. A ``crossing`` is the value of ``along`` (a parameter, or another metric)
    from which on that ratio is at least 1; without ``over``, from which on ``metric`` itself is.
    """

    text: str
    kind: str
    metric: str
    of: str
    paper: float
    over: str = ""
    along: str = ""
    where: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in CLAIM_KINDS:
            raise ValueError(f"kind: got {self.kind!r}, allowed are {', '.join(CLAIM_KINDS)}")
        if self.kind == "ratio" and not self.over:
            raise ValueError("over: missing, a ratio is of one system over another")
        if self.kind == "ratio" and self.along:
            raise ValueError(f"along: got {self.along!r}, which goes with kind crossing")
        if self.kind == "crossing" and not self.along:
            raise ValueError("along: missing, a crossing lies along a parameter or metric")
        if self.paper <= 0:
            raise ValueError(f"paper: got {self.paper:g}, allowed is a number above 0")
        for name, value in self.where.items():
            if not isinstance(value, str | int | float):
                raise ValueError(f"where.{name}: got {value!r}, allowed is a string, a number, or true or false")

    def check(self, systems: Mapping[str, str], metrics: set[str], params: Collection[str]) -> None:
        """Compare with what an experiment measures and shows; no ``metrics`` means that all are shown.

        Raises:
            ValueError: a name is not there; the message begins with its key.
        """
        for key, system in (("of", self.of), ("over", self.over)):
            if system and system not in systems:
                raise ValueError(f"{key}: system {system!r} is not among systems: {', '.join(systems)}")
        for key, name, allowed in (("metric", self.metric, metrics), ("along", self.along, {*metrics, *params})):
            if metrics and name and name not in allowed:
                raise ValueError(f"{key}: got {name!r}, allowed is what render names: {', '.join(sorted(allowed))}")
        for name in self.where:
            if name not in params:
                raise ValueError(f"where.{name}: unknown, allowed are the parameters that render names: "
                                 f"{', '.join(params) or 'none'}")
