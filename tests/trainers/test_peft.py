"""Clippers of models with adapters of PEFT, also on frozen weights of 8 bits."""

import peft
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from autoclip_torch import NormClip, QuantileClip
from autoclip_torch.transformers import ClipCallback

from ..support.language_model import make_model

LIMIT = 1e-3
LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=4)


def backward(model):
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@pytest.mark.parametrize("how", ["by hand", "attached", "as optimizer"])
def test_the_adapters_are_clipped_and_the_rest_is_not_measured(how):
    model = peft.get_peft_model(make_model(), LORA)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    if how == "as optimizer":
        optimizer = NormClip.as_optimizer(optimizer, LIMIT, scope="global", model=model)
        clipper = optimizer.clipper
    else:
        clipper = NormClip(model, LIMIT, scope="global")
        if how == "attached":
            clipper.attach(optimizer)
    backward(model)
    norm = torch.cat([p.grad.flatten() for p in trained]).norm().item()
    if how == "by hand":
        clipper.step()
    optimizer.step()
    assert clipper.metrics()["clip/norm"] == pytest.approx(norm, rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in trained]).norm().item()
    assert after == pytest.approx(LIMIT, rel=1e-4)


def freeze_as_integers(model):
    """Keep the first layer's frozen weights as uint8, as QLoRA does."""
    for name, parameter in list(model.named_parameters()):
        if name.endswith("up_proj.weight"):
            layer = model.get_submodule(name.rpartition(".")[0])
            size = len(parameter)
            weight = torch.zeros_like(parameter, dtype=torch.uint8)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.forward = lambda x, size=size: x.new_zeros(*x.shape[:-1], size)
    return model


def test_frozen_integer_weights_are_left_out():
    model = freeze_as_integers(peft.get_peft_model(make_model(), LORA))
    clipper = QuantileClip(model, quantile=0.5)
    backward(model)
    clipper.step()
    assert clipper.metrics()["clip/steps"] == 1
    assert not any("up_proj" in name for name in clipper.names)
    clipper.load_state_dict(clipper.state_dict())


def test_the_trainer_of_hugging_face_clips_adapters(tmp_path):
    model = freeze_as_integers(peft.get_peft_model(make_model(), LORA))
    callback = ClipCallback(NormClip, max_norm=LIMIT, scope="global")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, max_grad_norm=0, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = {"input_ids": TOKENS.tolist(), "labels": TOKENS.tolist()}
    data = Dataset.from_dict(rows)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert [log["clip/steps"] for log in logs] == [1, 2]
    for log in logs:
        assert log["clip/norm"] == pytest.approx(log["grad_norm"], rel=1e-4)
