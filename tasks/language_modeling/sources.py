"""Which sources the data of an evaluation comes from. Apart, for it needs neither Lightning nor transformers."""

from __future__ import annotations

from pathlib import Path

from tasks.data.sources import resolve
from tasks.data.specs import ItemSpec, TextSpec
from tasks.errors import DataError
from tasks.language_modeling.settings import TrainSettings


def evaluation_sources(settings: TrainSettings, data_root: Path | None, *, ask_hub: bool) -> dict[str, str | None]:
    """Return, for each key below ``evaluation``, the source that serves it here; None where there is none.

    Args:
        settings: of the experiment.
        data_root: the local data folder, if any.
        ask_hub: ask the hub where a source names it, rather than assume that it answers.

    Raises:
        DataError: naming the key: the hub was to serve, was asked, and does not answer.
    """
    found: dict[str, str | None] = {}
    for key, spec in _specs(settings).items():
        try:
            found[key] = resolve(spec, data_root, ask_hub=False)
        except DataError:
            found[key] = None
        if ask_hub and (found[key] or "").startswith("hub:"):
            try:
                resolve(spec, data_root)
            except DataError as error:
                raise DataError(f"evaluation.{key}: {error}; null leaves it out") from error
    return found


def _specs(settings: TrainSettings) -> dict[str, ItemSpec | TextSpec]:
    plan = settings.evaluation
    if plan is None:
        return {}
    items = {name: spec for name in ("hellaswag", "lambada") if (spec := getattr(plan, name)) is not None}
    return items | {f"texts.{name}": spec for name, spec in plan.texts.items()}
