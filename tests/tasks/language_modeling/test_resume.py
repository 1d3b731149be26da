"""A training that is killed and called again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tasks.config import REPOSITORY
from tasks.errors import UserError
from tasks.language_modeling import training

ENTMAX = {"attention": "adasplash", "alpha_schedule": {"start": 1.0, "end": 1.8, "steps": 20}}
LEARNED = {"attention": "adasplash", "alpha": 1.5, "learn_alpha": True}
STEPS, ACCUMULATE = 11, 2


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.ckpt"))


def steps_of(seen: list) -> list[int]:
    return [one.step for one in seen]


@pytest.mark.parametrize(
    ("case", "recipe", "variant", "kills"),
    [
        ("between two checkpoints", {}, {"attention": "sdpa"}, [(8, 0)]),
        ("between two micro-batches", {}, {"attention": "sdpa"}, [(7, 1)]),
        ("without accumulation", {"micro_batch_size": 4}, {"attention": "sdpa"}, [(7, 0)]),
        ("alpha on its way", {}, ENTMAX, [(8, 1)]),
        ("alpha being learnt", {}, LEARNED, [(8, 1)]),
        ("a checkpoint before each validation", {"checkpoint_every": 2}, ENTMAX, [(7, 0)]),
        ("a checkpoint at every step", {"checkpoint_every": 1}, {"attention": "sdpa"}, [(3, 0), (4, 1)]),
        ("again in the first step after resuming", {}, {"attention": "sdpa"}, [(4, 0), (3, 1), (8, 0)]),
        ("in the validation before a checkpoint", {}, ENTMAX, [(6, "validation")]),
        ("before the first checkpoint", {}, {"attention": "sdpa"}, [(2, 1)]),
        ("in the last step", {"eval_every": 3}, ENTMAX, [(10, 1)]),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)  # fmt: skip
def test_killed_and_called_again(
    settings, train, make_context, watch, killed, said, assert_same_run, case, recipe, variant, kills
):
    wanted = settings(train=recipe, variants={"it": variant})
    whole = watch()
    uninterrupted = train(wanted, "it", where=make_context("whole"))
    accumulate = 4 // wanted.train.micro_batch_size
    assert steps_of(whole) == [step for step in range(STEPS) for _ in range(accumulate)]
    interrupted = make_context("interrupted")
    for step, micro in kills:
        watch(step, micro)
        with killed():
            train(wanted, "it", where=interrupted)
    said.clear()
    rest = watch()
    run = train(wanted, "it", where=interrupted)
    every = wanted.train.checkpoint_every
    last = max((step - (micro == "validation")) // every * every for step, micro in kills)
    assert rest == whole[last * accumulate:]  # tokens, learning rates and alphas, from the last checkpoint on
    assert any("resuming" in line for line in said) == (last > 0)
    assert_same_run(run, uninterrupted)
    assert sorted(run.curve) == sorted({*range(wanted.train.eval_every, STEPS + 1, wanted.train.eval_every), STEPS})


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from tasks.config import from_plain
from tasks.language_modeling.settings import TrainSettings
from tasks.language_modeling.training import trained
from tasks.programs import Context, Job
import json, torch

torch.set_num_threads(1)
replace, saved = os.replace, []

def killed_at_the_second_checkpoint(source, target):
    if str(target).endswith(".ckpt"):
        saved.append(target)
        if len(saved) == 2:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = os.rename = killed_at_the_second_checkpoint
settings = from_plain(TrainSettings, json.loads(sys.argv[1]), "test.yaml")
trained(settings, Job("softmax", 0), Context(Path(sys.argv[2]), Path(sys.argv[3]), print))
"""


def test_process_killed_while_saving(plain, settings, train, make_context, watch, texts, assert_same_run):
    interrupted = make_context("interrupted")
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, json.dumps(plain()), str(interrupted.workspace), str(texts)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    whole = watch()
    uninterrupted = train(settings(), where=make_context("whole"))
    rest = watch()
    run = train(settings(), where=interrupted)
    assert rest == whole[3 * ACCUMULATE:]  # the first checkpoint is whole, the second never came to be
    assert_same_run(run, uninterrupted)


@pytest.fixture
def half_way(settings, train, context, watch, killed) -> Path:
    """Train past the second checkpoint, be killed, and return that checkpoint's path."""
    watch(8)
    with killed():
        train(settings())
    [path] = checkpoints(context.workspace)
    return path


class Unwanted:
    """Runs code when unpickled, as a checkpoint from a stranger would."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "bytes flipped", "code"])
def test_damaged_checkpoint(
    damage, half_way, settings, train, make_context, watch, said, monkeypatch, tmp_path, assert_same_run
):
    monkeypatch.chdir(tmp_path)
    content = half_way.read_bytes()
    middle = len(content) // 2
    if damage == "code":
        torch.save(Unwanted(), half_way)
    else:
        flipped = content[:middle] + bytes(255 - b for b in content[middle:middle + 4096]) + content[middle + 4096:]
        half_way.write_bytes({"empty": b"", "half": content[:middle], "text": b"no checkpoint\n",
                              "bytes flipped": flipped}[damage])  # fmt: skip
    said.clear()
    seen = watch()
    run = train(settings())
    assert steps_of(seen) == [step for step in range(STEPS) for _ in range(ACCUMULATE)]
    [line] = [line for line in said if "checkpoint" in line]
    assert line.startswith("softmax (seed 0): ") and str(half_way) in line and "\n" not in line
    assert not Path("unpickled").exists()
    assert_same_run(run, train(settings(), where=make_context("whole")))


def test_checkpoints_are_loaded_without_unpickling_objects(half_way, settings, train, watch, monkeypatch):
    asked = []
    load = torch.load

    def watched(file, *arguments, **keywords):
        asked.append(keywords.get("weights_only"))
        return load(file, *arguments, **keywords)

    monkeypatch.setattr(torch, "load", watched)
    watch()
    train(settings())
    assert asked and set(asked) == {True}


def test_checkpoint_never_passes_through_another_disk(half_way, settings, train, watch, killed, monkeypatch):
    """A move from the system's temporary folder is a copy when that is another disk, and can be cut short."""
    monkeypatch.setattr("tempfile.tempdir", str(half_way.parent / "missing"))
    before = half_way.read_bytes()
    watch(10)
    with killed():
        train(settings())
    assert half_way.read_bytes() != before
    assert [p.name for p in half_way.parent.iterdir()] == [half_way.name]


@pytest.mark.parametrize("checkpoint_every", [3, 11])
def test_model_that_could_not_be_saved(
    checkpoint_every, settings, train, make_context, watch, monkeypatch, assert_same_run
):
    """After the last step there is nothing left to train, but alpha must be that of the last step."""
    wanted = settings(train={"checkpoint_every": checkpoint_every}, variants={"it": ENTMAX})
    uninterrupted = train(wanted, "it", where=make_context("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(training.GPT2LMHeadModel, "save_pretrained", full_disk)
        with pytest.raises(UserError, match="No space left on device"):
            train(wanted, "it")
    seen = watch()
    run = train(wanted, "it")
    assert steps_of(seen) == ([] if checkpoint_every == STEPS else [9, 9, 10, 10])
    assert_same_run(run, uninterrupted)


def full_disk(*arguments, **keywords):
    raise OSError(28, "No space left on device")


@pytest.fixture
def interruptible():
    """Python's own handler, also where these tests are started in the background, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_by_a_signal(
    which, settings, train, make_context, watch, assert_same_run, monkeypatch, interruptible
):
    """Lightning would exit with status 1 (SIGINT) or even 0 (SIGTERM)."""
    before = signal.getsignal(signal.SIGINT)
    watch()
    watched = training.CausalLanguageModel

    class Interrupted(watched):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 8:
                signal.raise_signal(which)

    with monkeypatch.context() as patch:
        patch.setattr(training, "CausalLanguageModel", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(settings())
    assert signal.getsignal(signal.SIGINT) is before
    seen = watch()
    assert_same_run(train(settings()), train(settings(), where=make_context("whole")))
    assert steps_of(seen)[0] == 6
