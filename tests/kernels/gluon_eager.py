"""Gluon's language as far as the package uses it, on tensors of PyTorch: what a kernel computes, without a GPU.

Triton's interpreter does not know Gluon. Here a kernel's module runs as ordinary Python with a language of its own,
``Language``. Layouts are not looked at, and barriers and fences do nothing, so that this says nothing about either.
What is copied in the background arrives when it is waited for, and no sooner.
A scalar that differs from warp to warp stands for all its values: memory that it indexes has all parts, and a product
takes the part of a row's group.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from adasplash_kernels.on_chip import TOLERANCE
from adasplash_kernels.spans import padding

EACH = object()  # the number of a thread's group of warps


class Value:
    """A tensor of the language."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.data.to(dtype))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index])

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __hash__(self) -> int:
        return id(self)


def data(x: Any) -> Any:
    return x.data if isinstance(x, Value) else x


def _divide(a: Any, b: Any) -> Tensor:
    return torch.div(torch.as_tensor(a), b, rounding_mode="trunc")  # as C does


def _operations() -> None:
    def of(function: Callable[[Any, Any], Any], turned: bool) -> Callable[[Value, Any], Any]:
        def apply(a: Value, b: Any) -> Any:
            if isinstance(b, Pointer):
                return NotImplemented
            return Value(function(data(b), a.data) if turned else function(a.data, data(b)))

        return apply

    for name in ("add", "sub", "mul", "and", "or"):
        function = getattr(operator, f"{name}_" if name in ("and", "or") else name)
        setattr(Value, f"__{name}__", of(function, False))
        setattr(Value, f"__r{name}__", of(function, True))
    for name in ("lt", "le", "gt", "ge", "eq"):
        setattr(Value, f"__{name}__", of(getattr(operator, name), False))
    for name, function in (("floordiv", _divide), ("mod", torch.remainder)):
        setattr(Value, f"__{name}__", of(function, False))


class Pointer:
    """Places in a tensor's memory."""

    def __init__(self, tensor: Tensor, at: Any = 0) -> None:
        self.memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        self.at = at if at is not None else 0
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        moved = object.__new__(Pointer)
        moved.__dict__.update(self.__dict__, at=self.at + data(offset))
        return moved

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.at)
        there = torch.ones_like(at, dtype=torch.bool) if mask is None else data(mask).expand(at.shape)
        assert ((at >= 0) & (at < len(self.memory)))[there].all(), "outside of the tensor"
        return at, there


def pointer(tensor: Tensor | None) -> Pointer | None:
    return None if tensor is None else Pointer(tensor, tensor.storage_offset())


class Shared:
    """Shared memory, full of NaN, or of the largest integer, at first."""

    def __init__(self, memory: Tensor, of_each: bool = False) -> None:
        self.memory, self.of_each = memory, of_each
        self.dtype = memory.dtype
        self.shape = list(memory.shape)

    def index(self, i: Any) -> Shared:
        return Shared(self.memory, True) if i is EACH else Shared(self.memory[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.memory.narrow(int(self.of_each), start, length), self.of_each)

    def permute(self, order: tuple[int, ...]) -> Shared:
        assert order == (1, 0)
        return Shared(self.memory.mT, self.of_each)

    def load(self, layout: Any) -> Value:
        return Value(self.memory.clone())

    def store(self, value: Value) -> None:
        assert value.data.dtype == self.memory.dtype
        self.memory.copy_(value.data)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        assert self.memory.is_contiguous() and dtype == self.dtype
        return Shared(self.memory.view(-1)[: math.prod(shape)].view(shape))


def _reduce(x: Any, axis: int, function: Callable[..., Any]) -> Any:
    several = isinstance(x, tuple)
    parts = [each.data.unbind(axis) for each in (x if several else (x,))]
    found = tuple(Value(part[0]) for part in parts)
    for row in zip(*(part[1:] for part in parts), strict=True):
        found = function(*found, *map(Value, row))
        found = found if isinstance(found, tuple) else (found,)
    return found if several else found[0]


def _product(a: Any, b: Shared, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
    left = a.memory if isinstance(a, Shared) else a.data
    right = b.memory if b.of_each else b.memory[None]
    assert left.dtype == right.dtype
    rows = left.float().reshape(len(right), -1, left.shape[-1])
    return Value((rows @ right.float()).reshape(acc.data.shape) + (acc.data if use_acc else 0))


def _maximum(a: Any, b: Any, propagate_nan: Any = tl.PropagateNan.NONE) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    a, b = (torch.as_tensor(data(x)) for x in (a, b))
    return Value(
        (torch.maximum if propagate_nan == tl.PropagateNan.ALL or not a.is_floating_point() else torch.fmax)(a, b)
    )


def _minimum(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return Value(torch.minimum(*(torch.as_tensor(data(x)) for x in (a, b))))


def _ignored(*arguments: Any, **options: Any) -> None:
    return None


def _load(at: Pointer, mask: Any = None, other: Any = None) -> Value:
    places, there = at.places(mask)
    return Value(torch.where(there, at.memory[torch.where(there, places, 0)], 0 if other is None else other))


def _store(at: Pointer, value: Value, mask: Any = None) -> None:
    places, there = at.places(mask)
    assert value.data.dtype == at.memory.dtype
    at.memory[places[there]] = value.data.expand(places.shape)[there]


class Copies:
    """Copies in the background, in groups; each reads its source when it is started."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[Shared, Value]]] = [[]]

    def start(self, place: Shared, at: Pointer, mask: Any = None) -> None:
        value = _load(at, mask)
        assert value.shape == place.shape
        place.memory.fill_(float("nan"))
        self.groups[-1].append((place, value))

    def commit(self) -> None:
        self.groups.append([])

    def wait(self, left: int) -> None:
        while len(self.groups) > left + 1:
            for place, value in self.groups.pop(0):
                place.store(value)


class Language:
    """``gl`` for one program."""

    constexpr = staticmethod(lambda x: x)
    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    NVMMADistributedLayout = NVMMASharedLayout = SwizzledSharedLayout = staticmethod(_ignored)
    BlockedLayout = SliceLayout = DotOperandLayout = staticmethod(_ignored)
    static_range = range
    load, store = staticmethod(_load), staticmethod(_store)
    reduce = staticmethod(_reduce)
    maximum, minimum = staticmethod(_maximum), staticmethod(_minimum)
    barrier = staticmethod(_ignored)
    to_tensor = staticmethod(lambda x: x)
    convert_layout = staticmethod(lambda x, layout: x)
    inline_asm_elementwise = staticmethod(lambda *a, **k: EACH)
    reshape = staticmethod(lambda x, shape: Value(x.data.reshape(shape)))
    expand_dims = staticmethod(lambda x, axis: Value(x.data.unsqueeze(axis)))
    zeros = staticmethod(lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)))
    zeros_like = staticmethod(lambda x: Value(torch.zeros_like(x.data)))
    where = staticmethod(lambda c, a, b: Value(torch.where(c.data, data(a), data(b))))
    sqrt = staticmethod(lambda x: Value(x.data.sqrt()))
    fdiv = staticmethod(lambda a, b: Value(data(a) / data(b)))
    sum = staticmethod(lambda x, axis: Value(x.data.sum(axis)))
    max = staticmethod(lambda x, axis: Value(x.data.amax(axis)))
    cdiv = staticmethod(lambda a, b: -(-int(a) // int(b)))

    def __init__(self, program: int, warps: int) -> None:
        self._program, self._warps = program, warps

    def program_id(self, axis: int) -> Value:
        return Value(torch.tensor(self._program, dtype=torch.int32))

    def num_warps(self) -> int:
        return self._warps

    def arange(self, start: int, end: int, layout: Any = None) -> Value:
        return Value(torch.arange(start, end, dtype=torch.int32))

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else 2**31 - 1, dtype=dtype))


def _jit(function: Any = None, **options: Any) -> Any:
    return _jit if function is None else function


_operations()


def _range(*bounds: Any) -> Iterator[Value]:
    return (Value(torch.tensor(i, dtype=torch.int32)) for i in range(*map(int, bounds)))


def _imports_what_is_given(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").startswith("triton")
    return isinstance(node, ast.Import) and node.names[0].name.startswith("triton")


def program(modules: list[Path], number: int, warps: int) -> dict[str, Any]:
    """Return the functions of some modules, each of which may use those before, for one program of a launch."""
    language, copies = Language(number, warps), Copies()
    names: dict[str, Any] = {
        "gl": language, "gluon": SimpleNamespace(jit=_jit), "tl": tl, "range": _range, "launched_by_key": _jit,
        "open_sizes": lambda x, size: size, "fence_async_shared": _ignored, "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda number, deps: tuple(deps) if len(deps) > 1 else deps[0],
        "TOLERANCE": TOLERANCE.value,
        "async_copy_global_to_shared": copies.start, "commit_group": copies.commit, "wait_group": copies.wait,
        "pitch": lambda number, ALIGNED: number,
        "padding": FunctionType(padding.fn.__code__, {"tl": language}),
    }  # fmt: skip
    for path in modules:
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if not _imports_what_is_given(node)]
        exec(compile(tree, str(path), "exec"), names)
    return names
