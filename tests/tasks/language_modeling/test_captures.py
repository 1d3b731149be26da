"""Queries and keys kept along a training: which, when, and that the training is the same with them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tasks.errors import ConfigError
from tasks.language_modeling.data import TextDataModule
from tasks.models.score_capture import capture_scores

KEPT = {"system": "entmax", "every_steps": 4, "sequences": 3, "folder": "captured/here"}


def files(context):
    return sorted(path.name for path in (context.workspace / "captured/here").glob("*"))


def test_training_is_the_same_with_captures(settings, train, make_context, assert_same_run, said):
    kept, plain = make_context("kept"), make_context("plain")
    with_them = train(settings(captures=KEPT), "entmax", where=kept)
    assert "entmax (seed 0): step 8, queries and keys of every entmax layer kept: step-8.safetensors" in said
    without = train(settings(), "entmax", where=plain)
    assert_same_run(with_them, without)
    assert files(kept) == ["step-4.safetensors", "step-8.safetensors"] and files(plain) == []


def test_they_are_of_the_validation_text(settings, train, context):
    """Of its first windows, all layers; those of the last step are the saved model's."""
    wanted = settings(captures=KEPT | {"every_steps": 11})
    model = train(wanted, "entmax").load_model()
    data = TextDataModule(wanted, context.data_root, context.workspace / "data", 0)
    data.prepare_data()
    expected = capture_scores(model, torch.stack([data.valid_blocks[i][:-1] for i in range(3)]))
    found = load_file(context.workspace / "captured/here/step-11.safetensors")
    assert {name: tuple(x.shape) for name, x in found.items()} == {"q.0": (3, 2, 16, 8), "k.0": (3, 2, 16, 8)}
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name])


def test_only_the_first_seed_of_one_system_keeps_them(settings, train, context):
    wanted = settings(captures=KEPT, train={"seeds": [3, 0]})
    train(wanted, "softmax", seed=3)
    train(wanted, "entmax", seed=0)
    assert files(context) == []
    train(wanted, "entmax", seed=3)
    assert len(files(context)) == 2


def test_a_short_text_gives_fewer(settings, train, context):
    train(settings(captures=KEPT | {"sequences": 100}), "entmax")
    assert load_file(context.workspace / "captured/here/step-4.safetensors")["q.0"].shape[0] == 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "softmax"}, "captures.system: got 'softmax', allowed is a variant whose attention is adasplash"),
        ({"system": "other"}, "captures.system: got 'other'"),
        ({"every_steps": 0}, "captures.every_steps: got 0"),
        ({"sequences": 0}, "captures.sequences: got 0"),
        ({"folder": "../x"}, "captures.folder: got '../x', allowed is a folder below the workspace"),
        ({"folder": "/x"}, "captures.folder: got '/x'"),
    ],
)
def test_refused(changes, message, settings):
    with pytest.raises(ConfigError) as caught:
        settings(captures=KEPT | changes)
    assert message in str(caught.value)
