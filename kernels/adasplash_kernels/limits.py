"""Numbers that decide what is launched, besides tiles: how much is listed, and how much of it at once."""

from __future__ import annotations

from .tile_sizes import INTERPRETED

# Of the rows a block sees, those above which it visits tiles instead of a list. Where both take as long on an H200
# (docs/performance.md, ninth round); small inputs of tests would have no lists with it.
DENSEST = 2 / 3 if INTERPRETED else 1 / 4
ENTRIES = 2304  # of a list of columns, the most on average over the blocks of a head
WORKSPACE = 40 * 2**20  # bytes of bits and of lists of queries that exist at once; at least those of one head
PIECES = 512  # at the most, of a launch: about twice what a GPU works on at once
NARROW = 2**16  # rows whose numbers fit into 16 bits
LIST_TILES = True  # False to mark keys in all tiles, as a comparison
SCATTERED = 1 if INTERPRETED else 4  # programs that share a list whose marks are scattered
REST = 3 if INTERPRETED else 1024  # programs of a launch for the rest of the keys, at the most: usually there is none
# Keys whose scores for a block of queries stay on chip where nothing but masks is asked for: see on_chip.py
ON_CHIP = 32 if INTERPRETED else 128
ON_CHIP_HOPPER = 512
GRADIENTS_HOPPER = 512  # queries whose gradients stay on chip, likewise: see gradients_hopper.py
FILLED = 0.6  # of the multiprocessors, the least share that a kernel with a program a head is to keep at work
PIECE = 2 if INTERPRETED else 32  # tiles of a piece that the walk of a block of keys is cut into, at the least


def settings() -> tuple:
    """Return the numbers above: what is launched follows from them and from a call's arguments."""
    return (
        DENSEST, ENTRIES, WORKSPACE, PIECES, NARROW, LIST_TILES, SCATTERED, REST, ON_CHIP, ON_CHIP_HOPPER,
        GRADIENTS_HOPPER, FILLED, PIECE,
    )  # fmt: skip
