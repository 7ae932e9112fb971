"""Optimizers with few bits, of low rank, and without a schedule."""

import apollo_torch
import bitsandbytes
import galore_torch
import pytest
import schedulefree
import torch
import torchao.optim
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from autoclip_torch import NormClip
from autoclip_torch.transformers import ClipCallback

from ..support.language_model import make_model

LIMIT, STEPS, SIZE = 1e-3, 2, 64


@pytest.fixture(autouse=True)
def _run_eagerly():
    """torchao compiles each step, for half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


LOW_RANK = {"rank": 4, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std"}
APOLLO = {"proj": "random", "scale_type": "channel"}


def of_low_rank(make, **settings):
    """Return a function that makes an optimizer with a projected weight."""

    def create(layer):
        weights = {"params": [layer.weight], **LOW_RANK, **settings}
        return make([weights, {"params": [layer.bias]}], lr=1e-3)

    return create


def of(package, name):
    return lambda layer: getattr(package, name)(layer.parameters(), lr=1e-3)


OPTIMIZERS = {
    "8 bits": of(bitsandbytes.optim, "AdamW8bit"),
    "Lion, 8 bits": of(bitsandbytes.optim, "Lion8bit"),
    "paged, 8 bits": of(bitsandbytes.optim, "PagedAdamW8bit"),
    "paged": of(bitsandbytes.optim, "PagedAdamW32bit"),
    "torchao, 8 bits": of(torchao.optim, "AdamW8bit"),
    "torchao, 4 bits": of(torchao.optim, "AdamW4bit"),
    "torchao, fp8": of(torchao.optim, "AdamWFp8"),
    "GaLore": of_low_rank(galore_torch.GaLoreAdamW),
    "APOLLO": of_low_rank(apollo_torch.APOLLOAdamW, **APOLLO),
    "schedule-free SGD": of(schedulefree, "SGDScheduleFree"),
    "schedule-free RAdam": of(schedulefree, "RAdamScheduleFree"),
    "schedule-free wrapper": lambda layer: schedulefree.ScheduleFreeWrapper(
        torch.optim.SGD(layer.parameters(), lr=1e-3)
    ),
}


@pytest.mark.parametrize("how", ["attach", "as_optimizer"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_is_clipped(name, how):
    layer = torch.nn.Linear(SIZE, SIZE)
    optimizer = OPTIMIZERS[name](layer)
    if how == "attach":
        clipper = NormClip(layer, max_norm=LIMIT, scope="global")
        clipper.attach(optimizer)
    elif name == "schedule-free wrapper":  # it is no torch optimizer
        with pytest.raises(TypeError, match=r"Wrapper; .*clipper\.attach accepts"):
            NormClip.as_optimizer(optimizer, max_norm=LIMIT)
        return
    else:
        optimizer = NormClip.as_optimizer(optimizer, max_norm=LIMIT, scope="global")
        clipper = optimizer.clipper
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        layer(torch.ones(2, SIZE)).sum().backward()
        # Each output has the gradient 2, for each of its weights and its bias.
        norm = 2 * (SIZE * (SIZE + 1)) ** 0.5
        optimizer.step()
        metrics = clipper.metrics()
        assert metrics["clip/steps"] == step
        assert metrics["clip/norm"] == pytest.approx(norm, rel=1e-5)
        gradients = torch.cat([p.grad.flatten() for p in layer.parameters()])
        assert gradients.norm().item() == pytest.approx(LIMIT, rel=1e-3)


# The same optimizers, made by the trainer of Hugging Face from their names.

LAYERS = [r".*mlp.*"]
IN_THE_TRAINER = {
    "adamw_bnb_8bit": {},
    "paged_adamw_32bit": {},
    "adamw_torch_8bit": {},
    "schedule_free_sgd": {},
    "galore_adamw": {"optim_target_modules": LAYERS},
    "apollo_adamw": {"optim_target_modules": LAYERS},
}


def make_trainer(folder, callback, name, **settings):
    tokens = torch.randint(3, 11, (8, 6)).tolist()
    return Trainer(
        make_model(),
        TrainingArguments(
            output_dir=str(folder),
            optim=name,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            max_grad_norm=0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        callbacks=[callback],
    )


@pytest.mark.parametrize("name", IN_THE_TRAINER)
def test_the_trainer_of_hugging_face_clips_with_each_optimizer(tmp_path, name):
    callback = ClipCallback(NormClip, max_norm=LIMIT, scope="global")
    trainer = make_trainer(tmp_path, callback, name, **IN_THE_TRAINER[name])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert [log["clip/steps"] for log in logs] == [1, 2]
    for log in logs:
        assert log["clip/norm"] == pytest.approx(log["grad_norm"], rel=1e-4)
        assert log["clip/norm_after"] == pytest.approx(LIMIT, rel=1e-3)


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_a_layer_wise_optimizer_is_refused_with_the_way_out(tmp_path, name):
    """It steps each layer within the backward pass; the trainer has a dummy."""
    callback = ClipCallback(NormClip, max_norm=LIMIT)
    trainer = make_trainer(tmp_path, callback, name, optim_target_modules=LAYERS)
    with pytest.raises(ValueError, match=r"LayerWiseDummyOptimizer.* attach a clip"):
        trainer.train()
    layers = trainer.optimizer.optimizer.optimizer_dict
    clippers = []
    for parameter, optimizer in layers.items():
        clipper = NormClip([parameter], max_norm=LIMIT)
        clipper.attach(optimizer)
        clippers.append(clipper)
    trainer.remove_callback(callback)
    trainer.train()
    assert {clipper.metrics()["clip/steps"] for clipper in clippers} == {STEPS}
