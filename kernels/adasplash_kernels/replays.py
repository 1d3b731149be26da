"""Doing again what a call did: the same memory and the same launches, without the Python that worked them out.

What a function of this package launches follows from shapes, strides, dtypes and numbers; it never waits to see what a
tensor holds. So a function under ``@replayed`` runs as it is written for the first call of a kind. The second is also
taken down (recording.py), and from the third on calls are played from the record. A call is taken down whole or not at
all: where a tensor operation is part of it that does more than allocate or view, it runs as written for good.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .ahead import compile_together
from .launching import Launch
from .recording import Make, Place, Play, Recorder, Tuple, Unplayable

MOST = 512  # kinds of calls of a function that are remembered
ON_CPU = False  # True to play calls of Triton's interpreter too, as a test; this saves nothing there

Tensors = list[Tensor | None]


class _Step(NamedTuple):
    """A launch, made ready.

    Attributes:
        launch: the kernel, its grid and options.
        values: arguments, whatever in place of those below.
        places: index, number and offset of tensors.
        tuples: index, and the number of the tuple that goes there.
        first: the tuples that are used here first: number, class, values, and places.
        drops: tensors that nothing uses later.
    """

    launch: Launch
    values: list
    places: tuple
    tuples: tuple[tuple[int, int], ...]
    first: tuple
    drops: tuple[int, ...]


class Tape:
    """A call that was taken down.

    Args:
        recorder: what saw it.
        inputs: how many tensors, None among them, it was given.
        outputs: what it returned.

    Raises:
        Unplayable: what it did cannot be done from a record.
    """

    def __init__(self, recorder: Recorder, inputs: int, outputs: tuple[Tensor | None, ...]) -> None:
        if recorder.obstacle is not None:
            raise Unplayable(recorder.obstacle)
        self._count = recorder.count
        self._outputs = tuple(None if x is None else _output(recorder, x) for x in outputs)
        plays = [step for step in recorder.steps if isinstance(step, Play)]
        self._hooks = tuple({id(x.launch.kernel): x.launch.kernel.hooks for x in plays}.values())
        self._interpreted = all(x.launch.kernel.interpreted for x in plays)  # also of none
        self._tuples: dict[Any, int] = {}
        keep = {x for x in self._outputs if type(x) is int} | set(range(inputs))
        steps: list[Make | _Step] = []
        for step in reversed(recorder.steps):  # backwards, to see what is used last
            if isinstance(step, Play):
                used = {place.number for x in (step.arguments, *(x for _, x in step.tuples)) for _, place in x.places}
                steps.append(self._ready(step, tuple(used - keep)))
                keep |= used
            else:
                steps.append(step)
        self._steps = self._with_firsts(steps[::-1])

    @property
    def hooked(self) -> bool:
        """Whether Triton is to call something before a launch of one of the kernels."""
        return any(self._hooks)

    def _ready(self, step: Play, drops: tuple[int, ...]) -> _Step:
        tuples = tuple((index, self._numbered(x)) for index, x in step.tuples)
        launch = step.launch._replace(grid=(*step.launch.grid, 1, 1)[:3])
        return _Step(launch, list(step.arguments.values), step.arguments.places, tuples, (), drops)

    def _numbered(self, x: Tuple) -> int:
        """Return the number of a tuple; equal ones, which many launches are given, are one."""
        key = x, tuple(map(type, x.values))  # 1 is not True to a kernel
        return self._tuples.setdefault(key, len(self._tuples))

    def _with_firsts(self, steps: list[Make | _Step]) -> list[Make | _Step]:
        by_number, seen = [x for x, _ in self._tuples], set()
        result = []
        for step in steps:
            if isinstance(step, _Step):
                new = dict.fromkeys(number for _, number in step.tuples if number not in seen)
                seen.update(new)
                found = ((n, by_number[n]) for n in new)
                step = step._replace(first=tuple((n, _maker(x.kind), list(x.values), x.places) for n, x in found))
            result.append(step)
        return result

    def play(self, inputs: tuple[Tensor | None, ...], device: torch.device) -> tuple[Tensor | None, ...]:
        """Do the same with other tensors of the same kind; return the outputs."""
        tensors: Tensors = [*inputs, *[None] * (self._count - len(inputs))]
        tuples: list[tuple] = [()] * len(self._tuples)
        fill = _with_tensors if self._interpreted else _with_addresses
        stream = 0 if self._interpreted else driver.active.get_current_stream(driver.active.get_current_device())
        for step in self._steps:
            if type(step) is Make:
                tensors[step[0]] = _made(step, device)
                continue
            launch, values, places, at, first, drops = step
            for number, make, template, inside in first:
                tuples[number] = make(fill(template, inside, tensors))
            arguments = fill(values, places, tensors)
            for index, number in at:
                arguments[index] = tuples[number]
            _, compiled, grid, _, options = launch
            if compiled is None:
                launch.kernel[grid](*arguments, **options)
            else:
                function, metadata = compiled.function, compiled.packed_metadata
                compiled.run(*grid, stream, function, metadata, None, None, None, *arguments)
            for number in drops:
                tensors[number] = None
        return tuple([tensors[x] if type(x) is int else x and _made(x, device) for x in self._outputs])


def _made(make: Make, device: torch.device) -> Tensor:
    _, shape, strides, dtype, zeros = make
    x = (torch.zeros if zeros else torch.empty)(shape, dtype=dtype, device=device)
    return x if strides is None else x.as_strided(shape, strides)


def _output(recorder: Recorder, x: Tensor) -> int | Make:
    """Return the number of an output, which is to be one of the tensors that were allocated, or how to make it."""
    if not x.numel():
        return Make(-1, x.shape, None if x.is_contiguous() else x.stride(), x.dtype, False)
    place = recorder.place(x)
    for step in recorder.steps:
        if isinstance(step, Make) and step.number == place.number:
            if place[1:3] == (0, step.shape) and x.dtype == step.dtype:
                if x.is_contiguous() if step.strides is None else x.stride() == step.strides:
                    return step.number
    raise Unplayable("an output is not as it was allocated")


def _maker(kind: type[tuple]) -> Callable[[list], tuple]:
    """Return what makes a tuple, or a named one, of a list."""
    return getattr(kind, "_make", kind)


def _with_addresses(values: list, places: tuple, tensors: Tensors) -> list:
    """Put tensors in as compiled kernels take them, who look at nothing else of them."""
    result = values.copy()
    for index, place in places:
        result[index] = tensors[place[0]].data_ptr() + place[1]
    return result


def _with_tensors(values: list, places: tuple, tensors: Tensors) -> list:
    """Put tensors in as the interpreter takes them."""
    result = values.copy()
    for index, place in places:
        result[index] = _tensor(place, tensors)
    return result


def _tensor(place: Place, tensors: Tensors) -> Tensor:
    whole = tensors[place.number]
    start = whole.storage_offset() * whole.itemsize + place.offset
    x = torch.empty(0, dtype=place.dtype, device=whole.device)
    return x.set_(whole.untyped_storage(), start // x.itemsize, place.shape, place.strides)


def replayed(settings: Callable[[], tuple], ahead: Callable[..., None] | None = None) -> Callable:
    """Play calls of a function from a record where there is one.

    The function takes tensors, the first argument among them, None and hashable values by place, returns a tuple of
    tensors that it allocated and None, and launches kernels under ``@launched_by_key`` alone.

    Args:
        settings: returns what, besides arguments, decides what the function does.
        ahead: takes the same arguments and launches what is to be compiled before the first call of a kind; by default
            the function itself.
    """

    def decorate(function: Callable) -> Callable:
        records: dict[tuple, Tape | str | None] = {}  # None: seen once; a string: why there is no record

        @functools.wraps(function)
        def call(*arguments: Any) -> tuple[Tensor | None, ...]:
            device = arguments[0].device
            state = _state(device)
            if state is None:
                return function(*arguments)
            key = state, settings(), tuple([_kind(x) if isinstance(x, Tensor) else x for x in arguments])
            tape = records.get(key, _UNSEEN)
            if type(tape) is Tape:
                if tape.hooked:
                    return function(*arguments)
                return tape.play(tuple([x if isinstance(x, Tensor) else None for x in arguments]), device)
            if tape is None:
                result, records[key] = _record(function, arguments)
                return result
            if tape is _UNSEEN:
                if len(records) >= MOST:
                    records.clear()
                records[key] = None
                if device.type == "cuda":
                    compile_together(ahead or function, arguments)
            return function(*arguments)

        call.records = records
        return call

    return decorate


_UNSEEN = object()


def _kind(x: Tensor) -> tuple:
    """Return what of a tensor decides what is launched."""
    return x.shape, x.stride(), x.dtype, x.data_ptr() & 15


def _state(device: torch.device) -> Any:
    """Return what of Triton and of the device decides what is launched; None where calls must run as written."""
    if device.type != "cuda":
        return device.type if ON_CPU else None
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return None
    if getattr(runtime, "add_stages_inspection_hook", None):
        return None
    return driver.active.get_current_device(), runtime.debug, knobs.compilation.instrumentation_mode


def _record(function: Callable, arguments: tuple) -> tuple[tuple, Tape | str]:
    """Call a function; return its result, and the record or why there can be none."""
    # as objects of their own: that one tensor is given twice is no part of the kind
    own = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    recorder = Recorder([x if isinstance(x, Tensor) else None for x in own])
    with recorder:
        result = function(*own)
    try:
        return result, Tape(recorder, len(own), result)
    except Unplayable as error:
        return result, str(error)
