"""Settings of the language-modelling experiments, as their configs spell them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from adasplash_kernels.dispatch import METHODS
from tasks.checks import above_zero, at_least, distinct
from tasks.data.specs import ItemSpec, TextSpec, TokenizerSpec

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
SOFTMAX = ("sdpa", "flash", "cudnn")  # PyTorch's choice of backend, and two backends that are made to serve
ENTMAX = ("adasplash", "sort_torch", "bisection_torch")  # the kernels, and plain PyTorch that stores all scores
ATTENTIONS = (*SOFTMAX, *ENTMAX)


@dataclass(frozen=True)
class Data(TextSpec):
    """Text to train on, and how much of it is used; null is all."""

    max_train_tokens: int | None = None
    max_valid_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_train_tokens", "max_valid_tokens"):
            if (value := getattr(self, name)) is not None:
                at_least(1, **{name: value})


@dataclass(frozen=True)
class Model:
    """Size of a GPT-2 model; its vocabulary is the tokenizer's."""

    n_layer: int
    n_head: int
    n_embd: int
    context: int

    def __post_init__(self) -> None:
        at_least(1, n_layer=self.n_layer, n_head=self.n_head, context=self.context)
        if self.n_embd < 1 or self.n_embd % self.n_head:
            raise ValueError(f"n_embd: got {self.n_embd}, allowed is a multiple of n_head ({self.n_head})")


@dataclass(frozen=True)
class Schedule:
    """alpha moving linearly from ``start`` to ``end`` over the first ``steps`` optimizer steps."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if not 1 <= value <= 2:
                raise ValueError(f"{name}: got {value}, allowed is 1 (softmax) to 2 (sparsemax)")
        at_least(1, steps=self.steps)


@dataclass(frozen=True)
class Variant:
    """One system of the table: which attention, and its alpha: a number, on a schedule, or learnt by each head.

    With ``learn_alpha``, ``alpha`` is where every head starts. Layers not among ``layers`` keep softmax.
    """

    attention: str
    alpha: float = 1.5
    method: str = "auto"
    layers: tuple[int, ...] | None = None
    alpha_schedule: Schedule | None = None
    learn_alpha: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention: got {self.attention!r}, allowed are {', '.join(ATTENTIONS)}")
        if not 1 <= self.alpha <= 2:
            raise ValueError(f"alpha: got {self.alpha}, allowed is 1 (softmax) to 2 (sparsemax)")
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, allowed are {', '.join(METHODS)}")
        for name in ("alpha_schedule", "layers"):
            if self.attention != "adasplash" and getattr(self, name) is not None:
                raise ValueError(f"{name}: goes with attention adasplash, not with {self.attention}")
        if self.attention == "sort_torch" and self.alpha not in (1.5, 2):
            raise ValueError(f"alpha: got {self.alpha}, allowed with attention sort_torch is 1.5 or 2")
        if self.attention == "bisection_torch" and self.alpha == 1:
            raise ValueError(f"alpha: got {self.alpha}, allowed with attention bisection_torch is above 1, up to 2")
        if self.learn_alpha:
            self._check_learnt()
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError(f"layers: got {list(self.layers)}, allowed are distinct layers, or null for all")

    def _check_learnt(self) -> None:
        if self.attention != "adasplash":
            raise ValueError(f"learn_alpha: goes with attention adasplash, not with {self.attention}")
        if self.alpha_schedule is not None:
            raise ValueError("learn_alpha: goes without alpha_schedule; alpha is learnt or follows a schedule")
        if not 1 < self.alpha < 2:
            raise ValueError(f"alpha: got {self.alpha}, allowed with learn_alpha is a start between 1 and 2")


@dataclass(frozen=True)
class Train:
    """The recipe. ``batch_size`` counts sequences per optimizer step over all devices."""

    steps: int
    batch_size: int
    micro_batch_size: int
    lr: float
    betas: tuple[float, ...]
    weight_decay: float
    clip: float
    warmup_steps: int
    final_lr: float
    precision: str
    eval_every: int
    seeds: tuple[int, ...]
    timing_skip_steps: int
    timing_steps: int
    checkpoint_every: int
    compile: bool = False

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, batch_size=self.batch_size, micro_batch_size=self.micro_batch_size,
                  eval_every=self.eval_every, timing_steps=self.timing_steps, checkpoint_every=self.checkpoint_every)
        at_least(0, lr=self.lr, weight_decay=self.weight_decay, clip=self.clip, warmup_steps=self.warmup_steps,
                  final_lr=self.final_lr, timing_skip_steps=self.timing_skip_steps)
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size: got {self.batch_size}, allowed is a multiple of micro_batch_size "
                             f"({self.micro_batch_size})")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas: got {list(self.betas)}, allowed are two numbers in [0, 1)")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, allowed are {', '.join(PRECISIONS)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(0 <= s < 2**32 for s in self.seeds):
            raise ValueError(f"seeds: got {list(self.seeds)}, allowed is one or more distinct integers, 0 to 2^32 - 1")


@dataclass(frozen=True)
class EvaluationText(TextSpec):
    """A text whose loss is measured after training: the documents of ``split``; ``max_tokens`` null is all."""

    split: str = "test"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in ("valid", "test"):
            raise ValueError(f"split: got {self.split!r}, allowed are valid, test")
        if self.max_tokens is not None:
            at_least(1, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class Evaluation:
    """What a trained model is scored on besides its validation text.

    ``program: train`` scores it on the benchmarks, ``batch_tokens`` padded tokens at a time, and ``program:
    text_loss`` on the texts.
    """

    hellaswag: ItemSpec | None = None
    lambada: ItemSpec | None = None
    texts: dict[str, EvaluationText] = field(default_factory=dict)
    batch_tokens: int = 16_384

    def __post_init__(self) -> None:
        at_least(1, batch_tokens=self.batch_tokens)


@dataclass(frozen=True)
class Export:
    """Models to keep beside the records: those of at most ``max_mb`` MB (10^6 bytes) in ``dtype``."""

    max_mb: float = 12.0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        at_least(0, max_mb=self.max_mb)
        if self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype: got {self.dtype!r}, allowed are bfloat16, float16")


@dataclass(frozen=True)
class Captures:
    """Queries and keys kept along the training of ``system``'s first seed: every so many steps, of the first
    ``sequences`` windows of the validation text, as ``folder``/step-<N>.safetensors below the workspace."""

    system: str
    every_steps: int
    sequences: int
    folder: str

    def __post_init__(self) -> None:
        at_least(1, every_steps=self.every_steps, sequences=self.sequences)
        if not self.folder or Path(self.folder).is_absolute() or ".." in Path(self.folder).parts:
            raise ValueError(f"folder: got {self.folder!r}, allowed is a folder below the workspace")


@dataclass(frozen=True)
class TrainSettings:
    """What ``program: train`` and ``program: loss_curve`` take; the latter has no use for ``evaluation`` and
    ``export``."""

    data: Data
    tokenizer: TokenizerSpec
    model: Model
    variants: dict[str, Variant]
    train: Train
    evaluation: Evaluation | None = field(default=None, kw_only=True)
    export: Export | None = field(default=None, kw_only=True)
    captures: Captures | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("variants: empty, name at least one system")
        if self.captures is not None:
            kept = self.variants.get(self.captures.system)
            if kept is None or kept.attention != "adasplash":
                raise ValueError(f"captures.system: got {self.captures.system!r}, allowed is a variant whose attention "
                                 "is adasplash")
        for name, variant in self.variants.items():
            if variant.layers is not None and not all(0 <= i < self.model.n_layer for i in variant.layers):
                raise ValueError(f"variants.{name}.layers: got {list(variant.layers)}, allowed are 0 to "
                                 f"{self.model.n_layer - 1}")


@dataclass(frozen=True)
class Probe:
    """The input whose attention is inspected: the first ``tokens`` of the validation text."""

    tokens: int

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens)


@dataclass(frozen=True)
class NonzeroSettings(TrainSettings):
    """What ``program: nonzero_ratio`` takes."""

    probe: Probe

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe.tokens > self.model.context:
            raise ValueError(f"probe.tokens: got {self.probe.tokens}, allowed is 1 to context, {self.model.context}")


def _check_measured(measure: tuple[str, ...], variants: Mapping[str, Variant]) -> None:
    if not measure or len(set(measure)) != len(measure):
        raise ValueError(f"measure: got {list(measure)}, allowed are one or more distinct variants")
    for i, name in enumerate(measure):
        if name not in variants:
            raise ValueError(f"measure[{i}]: got {name!r}, allowed are {', '.join(variants)}")


@dataclass(frozen=True)
class ThroughputSettings(TrainSettings):
    """What ``program: throughput`` takes: ``measure`` names the variants that are trained and timed."""

    measure: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_measured(self.measure, self.variants)
        timed = self.train.timing_skip_steps + self.train.timing_steps
        if timed > self.train.steps:
            raise ValueError(f"train.steps: got {self.train.steps}, allowed is at least timing_skip_steps + "
                             f"timing_steps ({timed})")


@dataclass(frozen=True)
class CostTiming:
    """Optimizer steps left out, then timed. Timing ends early, after two steps or more, once the timed steps have
    taken ``max_seconds``."""

    skip_steps: int
    steps: int
    max_seconds: float

    def __post_init__(self) -> None:
        at_least(0, skip_steps=self.skip_steps)
        at_least(2, steps=self.steps)
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds: got {self.max_seconds}, allowed is above 0")


@dataclass(frozen=True)
class CostSettings(TrainSettings):
    """What ``program: step_cost`` takes: ``measure`` names the variants that are timed. ``data`` and ``tokenizer``
    come with the base and are not used: tokens are random numbers below ``vocab_size``.

    ``contexts`` are measured instead of the model's, with as many tokens a step and a micro-batch. Queries of the
    random weights are multiplied by ``query_scale``, which spreads the scores.
    """

    measure: tuple[str, ...]
    vocab_size: int
    timing: CostTiming
    contexts: tuple[int, ...] = ()
    query_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, vocab_size=self.vocab_size)
        _check_measured(self.measure, self.variants)
        for name in self.measure:
            if self.variants[name].alpha_schedule is not None:
                raise ValueError(f"variants.{name}.alpha_schedule: got a schedule, allowed here is a constant alpha")
        if self.train.precision == "16-mixed":
            raise ValueError("train.precision: got '16-mixed', allowed here are 32-true, bf16-mixed")
        above_zero(query_scale=self.query_scale)
        if self.contexts:
            distinct("contexts", self.contexts)
        tokens = self.train.micro_batch_size * self.model.context
        for i, context in enumerate(self.contexts):
            at_least(1, **{f"contexts[{i}]": context})
            if tokens % context:
                raise ValueError(f"contexts[{i}]: got {context}, allowed is what divides the {tokens} tokens of a "
                                 "micro-batch (train.micro_batch_size x model.context)")

    def by_context(self) -> Iterator[CostSettings]:
        """Yield the settings of each context, which has as many tokens a step and a micro-batch as the model's own."""
        for context in self.contexts or (self.model.context,):
            sequences = {name: getattr(self.train, name) * self.model.context // context
                         for name in ("batch_size", "micro_batch_size")}  # fmt: skip
            yield replace(self, contexts=(), model=replace(self.model, context=context),
                          train=replace(self.train, **sequences))  # fmt: skip
