"""A claim of a paper or a target of this project, as a config's ``claims`` spells it; ``tasks/render/claims.py`` holds
it against the records."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

CLAIM_KINDS = ("ratio", "crossing", "exponent", "most")
TARGET_KINDS = ("ratio", "exponent", "most")


@dataclass(frozen=True)
class Claim:
    """A sentence that a number, computed from records, bears out or does not.

    A ``ratio`` is ``metric`` of the system ``of`` over that of the system ``over``, where the parameters are as
    ``where`` says; the paper's is ``paper``. A ``crossing`` is the value of ``along`` (a parameter, or another metric)
    from which on that ratio is at least 1; without ``over``, from which on ``metric`` itself is.

    What this project set itself has ``target`` in place of ``paper``: what a ratio is to be at the least, and anything
    else at most: an ``exponent``, that of the power of ``along`` that comes closest to ``metric``, or the ``most`` that
    ``metric`` is in any setting.
    """

    text: str
    kind: str
    metric: str
    of: str
    paper: float | None = None
    over: str = ""
    along: str = ""
    where: dict[str, Any] = field(default_factory=dict)
    target: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in CLAIM_KINDS:
            raise ValueError(f"kind: got {self.kind!r}, allowed are {', '.join(CLAIM_KINDS)}")
        if self.kind == "ratio" and not self.over:
            raise ValueError("over: missing, a ratio is of one system over another")
        if self.kind in ("exponent", "most") and self.over:
            raise ValueError(f"over: got {self.over!r}, which goes with kinds ratio and crossing")
        if self.kind in ("ratio", "most") and self.along:
            raise ValueError(f"along: got {self.along!r}, which goes with kinds crossing and exponent")
        if self.kind in ("crossing", "exponent") and not self.along:
            raise ValueError(f"along: missing, the {self.kind} is along a parameter or metric")
        self._check_goal()
        for name, value in self.where.items():
            if not isinstance(value, str | int | float):
                raise ValueError(f"where.{name}: got {value!r}, allowed is a string, a number, or true or false")

    def _check_goal(self) -> None:
        if self.paper is None and self.target is None:
            raise ValueError("paper: missing, expected a number (or target, for what this project set itself)")
        if self.paper is not None and self.target is not None:
            raise ValueError(f"target: got {self.target:g} beside paper, allowed is one of the two")
        if self.target is not None and self.kind not in TARGET_KINDS:
            raise ValueError(f"target: got {self.target:g}, which goes with kinds {', '.join(TARGET_KINDS)}")
        if self.paper is not None and self.kind not in ("ratio", "crossing"):
            raise ValueError(f"paper: got {self.paper:g}, which goes with kinds ratio and crossing; give target")
        if self.paper is not None and self.paper <= 0:
            raise ValueError(f"paper: got {self.paper:g}, allowed is a number above 0")
        if self.target is not None and (self.target < 0 or (self.target == 0 and self.kind != "most")):
            raise ValueError(f"target: got {self.target:g}, allowed is a number above 0 (with kind most, 0 too)")

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
