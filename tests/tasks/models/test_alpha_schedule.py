"""AlphaSchedule: the ramp, its errors, and a run that is killed and resumed."""

from __future__ import annotations

import warnings

import pytest
import pytorch_lightning as pl
import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset

from adasplash_kernels.integrations.transformers import EntmaxAttentionConfig, get_entmax_config, use_entmax
from tasks.errors import ConfigError
from tasks.models.alpha_schedule import AlphaSchedule

BATCHES = 4  # in an epoch


def tiny_model() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=8, use_cache=False, initializer_range=0.3)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


class Module(pl.LightningModule):
    """Trains the tiny model and notes the alpha that every batch saw. Dies at step ``dies_at``."""

    def __init__(self, dies_at: int | None = None, entmax: bool = True) -> None:
        super().__init__()
        self.model = use_entmax(tiny_model()) if entmax else tiny_model()
        self.dies_at = dies_at
        self.seen: list[tuple[str, int, float]] = []
        self.logged: list[float] = []

    def note(self, stage: str) -> None:
        self.seen.append((stage, self.global_step, get_entmax_config(self).alpha))

    def training_step(self, batch, batch_idx):
        if self.global_step == self.dies_at:
            raise RuntimeError("killed")
        self.note("train")
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logged.append(float(self.trainer.callback_metrics["alpha"]))

    def validation_step(self, batch, batch_idx):
        self.note("validate")

    def test_step(self, batch, batch_idx):
        self.note("test")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> DataLoader:
    tokens = torch.randint(0, 17, (2 * BATCHES, 6), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(tokens), batch_size=2)


def fit(folder, module, schedule, max_steps=12, resume_from=None, **settings):
    save = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=BATCHES, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=[schedule, save],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(), loader(), ckpt_path=resume_from, weights_only=True)
    return trainer


def test_ramp():
    schedule = AlphaSchedule(1.0, 2.0, 4)
    assert [schedule.alpha_at(step) for step in range(7)] == [1.0, 1.25, 1.5, 1.75, 2.0, 2.0, 2.0]
    assert AlphaSchedule(1.01, 1.5, 50_000).alpha_at(25_000) == pytest.approx(1.255)
    assert AlphaSchedule(2, 1, 2).alpha_at(1) == 1.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("start", 0.9), ("start", "1"), ("end", 2.5), ("end", float("nan")), ("end", True)]
    + [("steps", v) for v in (0, -3, 2.0, None, True)],
)
def test_arguments(name, value):
    with pytest.raises(ConfigError, match=f"^{name}: got "):
        AlphaSchedule(**{"start": 1.0, "end": 1.5, "steps": 10, name: value})


def test_every_batch_sees_its_alpha(tmp_path):
    module, schedule = Module(), AlphaSchedule(1.0, 1.8, 8)
    trainer = fit(tmp_path, module, schedule, num_sanity_val_steps=1)
    train = [(step, alpha) for stage, step, alpha in module.seen if stage == "train"]
    assert train == [(step, schedule.alpha_at(step)) for step in range(12)]
    assert module.logged == pytest.approx([alpha for _, alpha in train])
    assert module.seen[0] == ("validate", 0, 1.0)  # the sanity check, although the model was made with alpha 1.5
    first_validation = [entry for entry in module.seen[1:] if entry[0] == "validate"][:BATCHES]
    assert first_validation == [("validate", 4, schedule.alpha_at(3))] * BATCHES
    assert module.model.config.entmax_attention["alpha"] == 1.8  # what save_pretrained would store
    trainer.test(module, loader(), verbose=False)
    assert module.seen[-1] == ("test", 12, 1.8)


def test_micro_batches_of_one_step_share_alpha(tmp_path):
    module, schedule = Module(), AlphaSchedule(1.0, 1.8, 4)
    fit(tmp_path, module, schedule, max_steps=4, accumulate_grad_batches=2, num_sanity_val_steps=0)
    train = [(step, alpha) for stage, step, alpha in module.seen if stage == "train"]
    assert train == [(step, schedule.alpha_at(step)) for step in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_killed_and_resumed(tmp_path):
    whole = Module()
    fit(tmp_path / "whole", whole, AlphaSchedule(1.0, 2.0, 10), num_sanity_val_steps=0)
    killed = Module(dies_at=6)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "killed", killed, AlphaSchedule(1.0, 2.0, 10), num_sanity_val_steps=0)
    checkpoint = tmp_path / "killed" / "step=4.ckpt"
    resumed = Module()
    get_entmax_config(resumed).alpha = 1.3  # must not matter
    fit(tmp_path / "killed", resumed, AlphaSchedule(1.0, 2.0, 10), resume_from=checkpoint)
    train = [entry for entry in whole.seen if entry[0] == "train"]
    assert [entry for entry in killed.seen if entry[0] == "train"] == train[:6]
    assert [entry for entry in resumed.seen if entry[0] == "train"] == train[4:]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_model_that_learns_its_alphas(tmp_path):
    module = Module(entmax=False)
    use_entmax(module.model, EntmaxAttentionConfig(1.5, learn_alpha=True))
    with pytest.raises(ConfigError, match="^alpha schedule: the model learns its alphas"):
        fit(tmp_path, module, AlphaSchedule(1.0, 1.5, 4))
    assert module.seen == []


def test_module_without_entmax(tmp_path):
    with pytest.raises(ConfigError, match="alpha schedule: .*use_entmax"):
        fit(tmp_path, Module(entmax=False), AlphaSchedule(1.0, 1.5, 4))
