"""The Hugging Face Trainer: a callback clips, and logs next to grad_norm.

The model is a tiny GPT-2 made from a config, and counts upwards; one sequence in ten is
noise. Run it: `python examples/hf_trainer.py`.
"""

import argparse
import tempfile

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from autoclip_torch import QuantileClip
from autoclip_torch.transformers import ClipCallback

TOKENS, LENGTH = 32, 16


def tiny_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def sequences(count: int) -> list[dict[str, torch.Tensor]]:
    """Numbers that count upwards from anywhere; every tenth sequence is noise."""
    starts = torch.randint(TOKENS, (count, 1))
    rows = (starts + torch.arange(LENGTH)) % TOKENS
    rows[::10] = torch.randint(TOKENS, rows[::10].shape)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(folder: str, steps: int) -> list[dict[str, float]]:
    """Return what the trainer logged."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        max_grad_norm=0,  # the trainer's own clipping, of 1.0 by default, comes first
        restore_callback_states_from_checkpoint=True,  # resume with the history
        learning_rate=0.01,
        per_device_train_batch_size=8,
        logging_steps=10,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        log_level="error",
    )
    clip = ClipCallback(QuantileClip, quantile=0.5, scope="global")
    data = sequences(8 * steps)
    trainer = Trainer(tiny_model(), arguments, train_dataset=data, callbacks=[clip])
    trainer.remove_callback(PrinterCallback)  # the table below has it
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        entries = train(folder, options.steps)
    print("step    loss  grad_norm  threshold  after  clip rate")
    for entry in entries:
        print(
            f"{entry['step']:4} {entry['loss']:7.3f} {entry['grad_norm']:10.3f} "
            f"{entry['clip/threshold']:10.3f} {entry['clip/norm_after']:6.3f} "
            f"{entry['clip/clip_rate']:10.0%}"
        )


if __name__ == "__main__":
    main()
