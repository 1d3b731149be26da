"""Taking down what a call does: which memory it asks for and which kernels it launches; see replays.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launching import Launch, listening

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default, _aten.empty_strided.default}
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}


class Place(NamedTuple):
    """Where a tensor is: so many bytes into the memory of one of the tensors of a call.

    Attributes:
        number: of that tensor, counted through the call's arguments and then what it allocates, in order.
        offset: bytes from that tensor's start.
        shape, strides, dtype: of this one.
    """

    number: int
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class Tuple(NamedTuple):
    """A tuple that holds tensors.

    Attributes:
        kind: its class.
        values: what it holds, None in place of tensors.
        places: where these are, by index.
    """

    kind: type[tuple]
    values: tuple
    places: tuple[tuple[int, Place], ...]


class Make(NamedTuple):
    """Memory that is asked for.

    Attributes:
        number: of the tensor, counted as in ``Place``.
        shape, dtype: of it.
        strides: None for a contiguous one.
        zeros: whether it is to hold zeros; else it may hold anything.
    """

    number: int
    shape: torch.Size
    strides: tuple[int, ...] | None
    dtype: torch.dtype
    zeros: bool


class Play(NamedTuple):
    """A launch, its arguments as in ``Tuple`` with tuples apart: which one, by index."""

    launch: Launch
    arguments: Tuple
    tuples: tuple[tuple[int, Tuple], ...]


class Unplayable(Exception):
    """The call does what cannot be played from a record."""


class Recorder(TorchDispatchMode):
    """Takes down what happens while it is entered.

    Args:
        inputs: the tensors that the call is given, no two of them the same object.

    Attributes:
        steps: what happened, in order.
        obstacle: why the call cannot be played; None if it can.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._inputs = {id(x): number for number, x in enumerate(inputs) if x is not None}
        self.count = len(inputs)
        self._made: dict[int, int] = {}  # by the address of memory, the number of the last tensor that was given it
        self.steps: list[Make | Play] = []
        self.obstacle: str | None = None
        self._launching = False

    def __enter__(self) -> Recorder:
        self._listening = listening(self._launched)
        self._listening.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._listening.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._launching:  # Triton's interpreter computes with tensors
            pass
        elif function in _EMPTY or function in _ZEROS:
            self._allocated(result, function in _ZEROS)
        elif not _is_view(function):
            self._impossible(f"{function} is part of it")
        return result

    def _impossible(self, why: str) -> None:
        self.obstacle = self.obstacle or why

    def _allocated(self, x: Tensor, zeros: bool) -> None:
        if x.untyped_storage().nbytes() != x.numel() * x.itemsize:
            self._impossible("memory with gaps is part of it")
        if not x.numel():  # no memory, to tell it by
            return
        self._made[x.untyped_storage().data_ptr()] = self.count
        self.steps.append(Make(self.count, x.shape, None if x.is_contiguous() else x.stride(), x.dtype, zeros))
        self.count += 1

    @contextlib.contextmanager
    def _launched(self, launch: Launch) -> Iterator[None]:
        self._take(launch)
        self._launching = True
        try:
            yield
        finally:
            self._launching = False

    def _take(self, launch: Launch) -> None:
        if launch.compiled is None and not launch.kernel.interpreted:
            self._impossible("a launch is left to Triton")
            return
        flat = list(launch.arguments)
        try:
            tuples = []
            for index, x in enumerate(flat):
                if isinstance(x, tuple) and any(isinstance(value, Tensor | tuple) for value in x):
                    tuples.append((index, self._split(x)))
                    flat[index] = None
            self.steps.append(Play(launch._replace(arguments=()), self._split(tuple(flat)), tuple(tuples)))
        except Unplayable as error:
            self._impossible(str(error))

    def _split(self, values: tuple) -> Tuple:
        if any(isinstance(x, tuple) and any(isinstance(y, Tensor | tuple) for y in x) for x in values):
            raise Unplayable("a tuple within a tuple holds tensors")
        at = tuple((i, self.place(x)) for i, x in enumerate(values) if isinstance(x, Tensor))
        return Tuple(type(values), tuple(None if isinstance(x, Tensor) else x for x in values), at)

    def place(self, x: Tensor) -> Place:
        """Return where a tensor is."""
        number, offset = self._inputs.get(id(x)), 0
        if number is None:  # not an argument; nor a view of one, as it could be of either of two that share memory
            start = x.untyped_storage().data_ptr()
            number, offset = self._made.get(start), x.data_ptr() - start
        if number is None:
            raise Unplayable("a tensor is used that is neither an argument nor allocated")
        return Place(number, offset, x.shape, x.stride(), x.dtype)


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    return bool(returns) and all(x.alias_info is not None and not x.alias_info.is_write for x in returns)
