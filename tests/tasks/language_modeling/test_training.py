"""Training runs: kept, shared, and what is noted on the way."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from pytorch_lightning.trainer.states import RunningStage, TrainerFn
from safetensors import SafetensorError

from adasplash_kernels.integrations.transformers import get_entmax_config
from tasks.errors import DataError, UserError
from tasks.language_modeling import callbacks, gpt2, training
from tasks.language_modeling.callbacks import LossCurve
from tasks.language_modeling.data import TextDataModule

STEPS, ACCUMULATE, BATCH = 11, 2, 4


def test_finished_run_is_shared(settings, train, watch, said, assert_same_run):
    first = train(settings())
    said.clear()
    seen = watch()
    again = train(settings())
    assert seen == []
    assert said[-1] == "softmax (seed 0): already trained for another table or figure"
    assert again == first
    assert_same_run(again, first)
    assert not list(first.folder.rglob("*.ckpt"))  # as large as the model thrice over, and of no more use


def test_seeds_and_programs_do_not_part_runs(settings, train, watch):
    """Other seeds beside the same one, and keys of another program, decide nothing."""
    train(settings())
    seen = watch()
    train(settings(train={"seeds": [5, 0]}))
    train(settings(probe={"tokens": 4}))
    assert seen == []


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"lr": 2e-2}},
        {"train": {"steps": 12}},
        {"train": {"final_lr": 1e-4}},
        {"train": {"precision": "bf16-mixed"}},
        {"model": {"n_head": 4}},
        {"variants": {"softmax": {"attention": "adasplash"}}},
        {"data": {"max_train_tokens": 19 * 16 + 1}},
        {"data": {"max_valid_tokens": 12 * 16 + 1}},
        {"data": {"train_files": ["valid.txt"], "valid_files": ["train.txt"]}},
    ],
    ids=str,
)
def test_other_settings_are_another_run(changes, settings, train, watch):
    one = train(settings())
    seen = watch()
    assert train(settings(**changes)).folder != one.folder
    assert seen


@pytest.mark.parametrize("what", ["seed", "code", "machine", "tokenizer", "text"])
def test_other_surroundings_are_another_run(what, settings, train, make_context, watch, monkeypatch, texts, tmp_path):
    one = train(settings())
    context, seed = make_context("work"), 0
    if what == "seed":
        seed = 1
    elif what == "code":
        monkeypatch.setattr(training, "code_sha256", lambda package: "other")
    elif what == "machine":
        monkeypatch.setattr(training, "environment", lambda: {"gpu": "another"})
    else:
        root = shutil.copytree(texts, tmp_path / "texts")
        context = type(context)(context.workspace, root, context.say)
        path = root / ("lm/tiny/valid.txt" if what == "text" else "tokenizers/tiny/tokenizer.json")
        text = path.read_text()
        path.write_text(text + "\nthe end" if what == "text" else text.replace('"<mask>"', '"<hole>"'))
    seen = watch()
    other = train(settings(), seed=seed, where=context)
    assert len(seen) == STEPS * ACCUMULATE
    assert other.folder != one.folder


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"curve": []}', '{"curve": {"x": 1}}', "\udcff"])
def test_damaged_result_is_trained_again(content, settings, train, watch, assert_same_run):
    first = train(settings())
    (first.folder / "run.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    seen = watch()
    again = train(settings())
    assert len(seen) == STEPS * ACCUMULATE
    assert_same_run(again, first)


def test_missing_model_is_trained_again(settings, train, watch):
    """Anything in the workspace may be deleted."""
    shutil.rmtree(train(settings()).folder / "model")
    seen = watch()
    train(settings()).load_model()
    assert len(seen) == STEPS * ACCUMULATE


def test_variants_of_one_seed_see_the_same_batches(settings, train, watch):
    seen = {}
    for system, seed in (("softmax", 0), ("entmax", 0), ("softmax", 1)):
        log = watch()
        train(settings(), system, seed)
        seen[system, seed] = [one.tokens for one in log]
    assert len(seen["softmax", 0]) == STEPS * ACCUMULATE
    assert seen["softmax", 0] == seen["entmax", 0]
    assert seen["softmax", 0] != seen["softmax", 1]


def test_variants_of_one_seed_start_from_the_same_weights(settings, train, monkeypatch):
    starts = []
    build = training.build_model

    def noted(*arguments):
        model = build(*arguments)
        starts.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return model

    monkeypatch.setattr(training, "build_model", noted)
    torch.manual_seed(5)
    train(settings(), "softmax")
    train(settings(), "entmax")
    train(settings(), "entmax", seed=1)
    softmax, entmax, other = starts
    assert list(softmax) == list(entmax)
    assert [name for name in softmax if not torch.equal(softmax[name], entmax[name])] == []
    assert not torch.equal(softmax["transformer.wpe.weight"], other["transformer.wpe.weight"])


@pytest.mark.parametrize("system", ["softmax", "entmax"])
def test_model_learns_and_its_loss_is_the_recorded_one(system, settings, train, texts, tmp_path):
    run = train(settings(train={"steps": 40, "eval_every": 2}), system)
    assert math.log(320) + 0.1 > run.curve[2] > run.curve[20] + 1
    assert run.final_loss == run.curve[40]
    data = TextDataModule(settings(), texts, tmp_path / "work" / "data", 0)
    data.setup()
    windows = torch.stack([data.valid_blocks[i] for i in range(13)])
    with torch.no_grad():
        logits = run.load_model()(input_ids=windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())  # a mean over all tokens
    assert run.final_loss == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize("system", ["softmax", "entmax"])
def test_saved_model_is_the_trained_one(system, settings, train, monkeypatch):
    built = []
    build = training.build_model
    monkeypatch.setattr(training, "build_model", lambda *arguments: built.append(build(*arguments)) or built[-1])
    run = train(settings(), system)
    loaded, trained = run.load_model(), built[0].eval()
    assert [path.name for path in (run.folder / "model").glob("model*")] == ["model.safetensors"]
    assert not loaded.training
    assert loaded.config._attn_implementation == trained.config._attn_implementation
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, trained(input_ids=tokens).logits)


def test_alpha_follows_its_schedule(settings, train, watch):
    ramp = {"start": 1.25, "end": 1.75, "steps": 8}
    seen = watch()
    run = train(settings(variants={"it": {"attention": "adasplash", "alpha": 2.0, "alpha_schedule": ramp}}), "it")
    expected = [1.25 + 0.5 * min(step, 8) / 8 for step in range(STEPS)]
    assert [one.alpha for one in seen] == [alpha for alpha in expected for _ in range(ACCUMULATE)]
    assert get_entmax_config(run.load_model()).alpha == 1.75


def test_facts(settings, train):
    facts = train(settings(), "entmax").facts
    model = train(settings(), "entmax").load_model()
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert (facts["data"], facts["tokenizer"]) == ("local:lm/tiny", "local:tokenizers/tiny")
    assert (facts["train_tokens"], facts["valid_tokens"]) == (STEPS * BATCH * 16, 13 * 16)
    assert (facts["context"], facts["attention"]) == (16, "adasplash")


@pytest.mark.parametrize(("eval_every", "points"), [(4, [4, 8, 11]), (11, [11]), (50, [11]), (1, list(range(1, 12)))])
def test_curve_ends_with_the_last_step(eval_every, points, settings, train):
    assert list(train(settings(train={"eval_every": eval_every})).curve) == points


def test_precision_is_used(settings, train):
    exact, rounded = (train(settings(train={"precision": p})).final_loss for p in ("32-true", "bf16-mixed"))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.05)


def test_model_and_loss_are_compiled(settings, train, monkeypatch, request):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compile_function, asked = torch.compile, []

    def compile_named(function):
        asked.append(function.__name__)
        return compile_function(function, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_named)  # a module's compile calls it too
    request.addfinalizer(gpt2._compiled_cross_entropy.cache_clear)
    plain = train(settings(train={"steps": 2}), "entmax")
    assert not graphs and not asked
    compiled = train(settings(train={"steps": 2, "compile": True}), "entmax")
    assert graphs and asked == ["_call_impl", "_cross_entropy"]
    assert compiled.final_loss == pytest.approx(plain.final_loss, abs=1e-4)
    assert list(compiled.load_model().state_dict()) == list(plain.load_model().state_dict())


def full_disk(*arguments, **keywords):
    raise OSError(28, "No space left on device")


def full_disk_to_safetensors(*arguments, **keywords):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "name", "failure"),
    [
        ("os", "fsync", full_disk),  # a checkpoint
        ("transformers.modeling_utils", "safe_save_file", full_disk_to_safetensors),  # the model
        ("tasks.language_modeling.training.CSVLogger", "save", full_disk),  # the log
        ("tasks.language_modeling.training.Path", "mkdir", full_disk),  # the folder
        ("tasks.language_modeling.training.Path", "write_text", full_disk),  # the result
    ],
)
def test_full_disk(place, name, failure, settings, train, watch, monkeypatch):
    train(settings(train={"steps": 1}))  # tokenises
    with monkeypatch.context() as patch:
        patch.setattr(f"{place}.{name}", failure)
        with pytest.raises(UserError) as caught:
            train(settings())
    message = str(caught.value).lower()
    assert "no space left on" in message and "softmax-seed0-" in message and "\n" not in message
    seen = watch()
    train(settings())
    assert seen  # it was not taken for finished


def test_wrong_data_leaves_no_run(settings, train, context):
    with pytest.raises(DataError, match="^context: got 400"):
        train(settings(model={"context": 400}))
    assert not (context.workspace / "language_modeling").exists()


class Clock:
    """A clock that moves on by one second a micro-batch, and notes when the device was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 0.0, []
        monkeypatch.setattr(callbacks.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(callbacks, "_wait", lambda: self.waits.append(self.now))
        watched = training.CausalLanguageModel

        class Ticking(watched):
            def training_step(inner, batch, batch_idx):
                self.now += 1
                return super().training_step(batch, batch_idx)

            def validation_step(inner, batch, batch_idx):
                self.now += 100
                return super().validation_step(batch, batch_idx)

        monkeypatch.setattr(training, "CausalLanguageModel", Ticking)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"timing_skip_steps": 3, "timing_steps": 4}, [2.0] * 4),
        ({"timing_skip_steps": 3, "timing_steps": 4, "micro_batch_size": 1}, [4.0] * 4),
        ({"timing_skip_steps": 0, "timing_steps": 2, "micro_batch_size": 4}, [1.0] * 2),
        ({"timing_skip_steps": 9, "timing_steps": 5}, [2.0] * 2),
        ({"timing_skip_steps": 11}, []),
    ],
    ids=str,
)
def test_wanted_steps_are_timed(recipe, expected, settings, train, monkeypatch):
    clock = Clock(monkeypatch)
    run = train(settings(train=recipe | {"eval_every": 1}))
    assert run.step_seconds == expected
    assert len(clock.waits) == 2 * len(expected)  # other steps are not held up
    if not expected:
        assert run.step_stats is None
    else:
        assert run.step_stats == {"n": len(expected), "min": expected[0], "max": expected[0], "std": 0.0}


def test_steps_are_timed_once_across_a_resume(settings, train, watch, killed, monkeypatch):
    wanted = settings(train={"timing_skip_steps": 1, "timing_steps": 8})
    watch(7, 1)
    clock = Clock(monkeypatch)
    with killed():
        train(wanted)
    assert len(clock.waits) == 13  # steps 1 to 6, and the start of step 7
    watch()
    clock = Clock(monkeypatch)
    run = train(wanted)
    assert run.step_seconds == [2.0] * 8  # 1 to 5 from the checkpoint, 6 to 8 timed anew
    assert len(clock.waits) == 6


def test_curve_leaves_out_the_sanity_check():
    said: list[str] = []
    curve = LossCurve(said.append, "it", 9)

    class Trainer:
        sanity_checking, global_step, is_global_zero = True, 4, True
        callback_metrics = {"val_loss": torch.tensor(1.25)}
        state = (TrainerFn.FITTING, RunningStage.SANITY_CHECKING)

    trainer = Trainer()
    curve.on_validation_end(trainer, None)
    assert curve.points == {} and said == []
    trainer.sanity_checking = False
    curve.on_validation_end(trainer, None)
    assert curve.points == {4: 1.25}
    assert said == ["it: step 4/9, validation loss 1.2500"]
    other = LossCurve(said.append, "it", 9)
    other.load_state_dict(curve.state_dict())
    assert other.points == {4: 1.25}


def test_progress_is_told(settings, train, said):
    run = train(settings(train={"steps": 4}))
    assert said[1] == f"softmax (seed 0): {run.facts['parameters']:,} parameters, 4 steps of 4 x 16 tokens"
    assert said[2:] == [f"softmax (seed 0): step {s}/4, validation loss {run.curve[s]:.4f}" for s in (2, 4)]
