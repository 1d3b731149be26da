"""The settings of a model's entmax attention: what ``use_entmax`` takes and config.json keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..dispatch import METHODS

ATTRIBUTE = "entmax_attention"  # on model.config: a JSON-able dict; on modules: the live object


@dataclass
class EntmaxAttentionConfig:
    """How a model's attention maps scores to weights. Assigning a field is checked too, and takes effect.

    alpha: 1 (softmax) to 2 (sparsemax).
    method: how ``adasplash_kernels.entmax_attention`` computes it.
    layers: indices of the layers that use entmax; the others keep softmax. None: all full-attention layers.
    learn_alpha: alpha is a parameter of each head and layer, which starts at ``alpha`` (see transformers_alpha.py).
        Decided by ``use_entmax``: on a model neither this nor, where it is True, ``alpha`` can be assigned.

    Raises:
        ValueError: a field has the wrong type or value; the message names it.
    """

    alpha: float = 1.5
    method: str = "auto"
    layers: tuple[int, ...] | None = None
    learn_alpha: bool = False

    def __post_init__(self) -> None:
        if self.learn_alpha and not 1 < self.alpha < 2:
            raise ValueError(f"alpha: got {self.alpha}, allowed with learn_alpha is a start between 1 and 2")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _CHECKS:
            raise ValueError(f"{name}: not a field of {type(self).__name__}, allowed are {', '.join(_CHECKS)}")
        value = _CHECKS[name](value)
        if "_stored" in self.__dict__:
            self._refuse_to_change(name, value)
        object.__setattr__(self, name, value)
        for stored in self.__dict__.get("_stored", ()):  # what save_pretrained writes follows what models do
            stored.update(self.to_dict())

    def _refuse_to_change(self, name: str, value: Any) -> None:
        """What the parameters of a model stand for is not for a setting to change."""
        if name == "learn_alpha" and value != self.learn_alpha:
            raise ValueError(f"learn_alpha: got {value}, the model was built with {self.learn_alpha}; see use_entmax")
        if self.learn_alpha and name in ("alpha", "layers") and value != getattr(self, name):
            raise ValueError(f"{name}: got {value}, but the model learns its alphas (learn_alpha); see use_entmax")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values JSON can hold; ``learn_alpha`` only where it is True."""
        held = {**asdict(self), "layers": None if self.layers is None else list(self.layers)}
        if not self.learn_alpha:
            del held["learn_alpha"]
        return held

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EntmaxAttentionConfig:
        """Build from ``to_dict``'s result. Missing keys take their default; unknown ones raise ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{ATTRIBUTE}: got {type(values).__name__}, allowed is a mapping")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"{ATTRIBUTE}: unknown {', '.join(unknown)}, allowed are {', '.join(known)}")
        return cls(**values)

    def _stored_copy(self) -> dict[str, Any]:
        """Return a dict for a model's config; it is kept equal to this object from now on."""
        stored = self.to_dict()
        object.__setattr__(self, "_stored", (*self.__dict__.get("_stored", ()), stored))
        return stored

    def uses_entmax(self, layer: int | None) -> bool:
        """Whether the layer of this index is to use entmax."""
        return self.layers is None or layer in self.layers


def _check_alpha(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 2:
        raise ValueError(f"alpha: got {value!r}, allowed is a number from 1 (softmax) to 2 (sparsemax)")
    return float(value)


def _check_method(value: Any) -> str:
    if value not in METHODS:
        raise ValueError(f"method: got {value!r}, allowed are {', '.join(METHODS)}")
    return value


def _check_layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    indices = tuple(value) if isinstance(value, list | tuple | range) else ()
    valid = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices)
    if not indices or not valid or len(set(indices)) != len(indices):
        raise ValueError(f"layers: got {value!r}, allowed is None or distinct layer indices from 0")
    return tuple(sorted(indices))


def _check_learn_alpha(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"learn_alpha: got {value!r}, allowed are True and False")
    return value


_CHECKS = {"alpha": _check_alpha, "method": _check_method, "layers": _check_layers, "learn_alpha": _check_learn_alpha}
