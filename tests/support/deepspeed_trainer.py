"""A Hugging Face `Trainer` under DeepSpeed, with the callback of docs/trainers.md.

`python -m tests.support.deepspeed_trainer DIR` writes `DIR/result.json`: for each stage
of ZeRO, the limit, the norm and the length of the step divided by the learning rate.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from autoclip_torch import QuantileClip

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
MARK = "# Hugging Face Trainer, in a TrainerCallback"
STAGES, STEPS, RATE = (1, 2, 3), 12, 1e-3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


def make_callback(clipper):
    """Return a callback with the functions of the page."""
    functions = {}
    exec(PAGE.read_text().split(MARK)[1].split("```")[0], functions)
    names = "on_step_begin", "on_log"
    kind = type("Page", (TrainerCallback,), {name: functions[name] for name in names})
    callback = kind()
    callback.clipper = clipper
    return callback


class Record(TrainerCallback):
    """Keeps what the engine did in each step. It stands before the page's callback."""

    def __init__(self, clipper, parameters):
        self.clipper, self.parameters, self.steps = clipper, parameters, []

    def read_weights(self):
        with deepspeed.zero.GatheredParameters(self.parameters):
            return torch.cat([p.detach().flatten().clone() for p in self.parameters])

    def on_step_begin(self, args, state, control, **kwargs):
        self.limit = min(self.clipper.threshold().item(), 1e9)
        self.before = self.read_weights()

    def on_log(self, args, state, control, logs, **kwargs):
        if "grad_norm" in logs:
            length = float((self.read_weights() - self.before).norm()) / RATE
            self.steps.append((self.limit, logs["grad_norm"], length))


def train(stage, folder):
    torch.manual_seed(0)
    model = Model()
    clipper = QuantileClip(model, quantile=0.5, scope="global")
    x = torch.randn(8 * STEPS, 4)
    data = [{"x": each, "labels": each.sum() + 9} for each in x]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        deepspeed={
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": "auto",
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    record = Record(clipper, list(model.parameters()))
    callbacks = [record, make_callback(clipper)]
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    return record.steps


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it compiles
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    results = {stage: train(stage, folder) for stage in STAGES}
    (folder / "result.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    main(Path(sys.argv[1]))
