"""What is counted: rows of Q, K and V loaded, and how many blocks of queries they were loaded for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"
PASSES = (FORWARD, BACKWARD)


class Reads(NamedTuple):
    """Rows (of head dimension d) loaded from global memory; one loaded twice counts twice, padding does not."""

    q: int = 0
    k: int = 0
    v: int = 0

    def plus(self, other: Reads) -> Reads:
        """Return the sum."""
        return Reads(self.q + other.q, self.k + other.k, self.v + other.v)


@dataclass
class Tally:
    """The reads of one pass, forward or backward, over all heads.

    Attributes:
        block_m, block_n: queries and keys of the tiles that output and gradients are made of.
        blocks: blocks of ``block_m`` queries, over all heads: what reads are divided by.
        parts: reads by kernel, or by step of a published algorithm.
    """

    block_m: int
    block_n: int
    blocks: int
    parts: dict[str, Reads] = field(default_factory=dict)

    def add(self, part: str, reads: Reads) -> None:
        """Count what a part read."""
        self.parts[part] = self.parts.get(part, Reads()).plus(reads)

    def per_block(self, operand: str) -> float:
        """Return rows of ``q``, ``k`` or ``v`` a block of queries, all parts together."""
        return sum(getattr(reads, operand) for reads in self.parts.values()) / self.blocks

    def by_part(self, operand: str) -> dict[str, float]:
        """Return rows a block of queries, by the parts that read this operand."""
        found = {part: getattr(reads, operand) / self.blocks for part, reads in self.parts.items()}
        return {part: rows for part, rows in found.items() if rows}
