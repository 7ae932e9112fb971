"""`ClipCallback` in the trainers of TRL, on a language model of one layer."""

import pytest
import torch
import trl
from datasets import Dataset

from autoclip_torch import NormClip, TrustClip
from autoclip_torch.transformers import ClipCallback

from ..support.language_model import make_model, make_tokenizer

STEPS, LIMIT = 3, 1e-3


def arguments(kind, folder, **settings):
    return kind(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )


def sft(folder, callback):
    return trl.SFTTrainer(
        make_model(),
        args=arguments(trl.SFTConfig, folder, max_length=16),
        train_dataset=Dataset.from_dict({"text": ["a b c d", "e f g h"] * 4}),
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )


def dpo(folder, callback):
    pairs = {"prompt": ["a b"], "chosen": [" c d"], "rejected": [" e f"]}
    return trl.DPOTrainer(
        make_model(),
        ref_model=make_model(),
        args=arguments(trl.DPOConfig, folder, max_length=16),
        train_dataset=Dataset.from_dict({k: v * 8 for k, v in pairs.items()}),
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )


def grpo(folder, callback):
    """The reward counts different words, so that completions differ in it."""

    def count_words(completions, **_):
        return [float(len(set(text.split()))) for text in completions]

    return trl.GRPOTrainer(
        make_model(),
        reward_funcs=count_words,
        args=arguments(
            trl.GRPOConfig, folder, max_completion_length=4, num_generations=2
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * 8}),
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_step_of_a_trainer_is_clipped(tmp_path, name):
    """The trainer's own norm is that before clipping, so it is ours, too."""
    callback = ClipCallback(NormClip, max_norm=LIMIT)
    trainer = TRAINERS[name](tmp_path, callback)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == STEPS
    for log in logs:
        assert log["clip/norm"] == pytest.approx(log["grad_norm"], rel=1e-4)
        norm = log["clip/norm"]
        assert log["clip/norm_after"] == pytest.approx(min(norm, LIMIT), rel=1e-4)
    assert callback.clipper.metrics()["clip/clip_rate"] > 0.5


def test_trust_clip_bounds_the_updates_of_a_trainer(tmp_path):
    callback = ClipCallback(TrustClip, ratio=1e-4)
    trainer = sft(tmp_path, callback)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        rms = torch.sqrt(torch.mean((parameter - before[name]) ** 2))
        size = torch.sqrt(torch.mean(before[name] ** 2)).clamp(min=0.2)
        assert 0 < rms <= STEPS * 1.001e-4 * size
