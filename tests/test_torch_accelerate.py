"""Clippers under Accelerate: its optimizer wrapper, accumulation and checkpoints."""

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

from accelerate.utils import ProjectConfiguration  # noqa: E402

from autoclip_torch import QuantileClip  # noqa: E402

QUANTILE = {"quantile": 0.5, "history_length": 8, "scope": "global"}


@pytest.fixture
def accelerator(tmp_path):
    yield make_accelerator(tmp_path)
    accelerate.state.AcceleratorState._reset_state(True)


def make_accelerator(folder):
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
    return accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, project_config=project
    )


def prepared(accelerator):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return accelerator.prepare(model, optimizer)


def batches(count):
    torch.manual_seed(1)
    return [(torch.randn(4, 3) * 2**i, torch.randn(4, 1)) for i in range(count)]


def loss_of(model, batch):
    return torch.nn.functional.l1_loss(model(batch[0]), batch[1])


def train(accelerator, model, optimizer, clipper, data, by_hand):
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if by_hand and accelerator.sync_gradients:
                clipper.step()
            optimizer.step()
            optimizer.zero_grad()


def plain(count):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    clipper, data = QuantileClip(model, **QUANTILE), batches(count)
    for pair in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        for batch in pair:
            (loss_of(model, batch) / 2).backward()
        clipper.step()
        optimizer.step()
    return model, clipper


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "attached"])
def test_it_clips_once_per_synchronised_step(accelerator, by_hand):
    model, optimizer = prepared(accelerator)
    clipper = QuantileClip(model, **QUANTILE)
    if not by_hand:
        clipper.attach(optimizer)
    train(accelerator, model, optimizer, clipper, batches(8), by_hand)
    expected, theirs = plain(8)
    assert clipper.metrics()["clip/steps"] == 4
    assert clipper.metrics()["clip/clip_rate"] == theirs.metrics()["clip/clip_rate"] > 0
    torch.testing.assert_close(model.weight, expected.weight)


def test_its_checkpoint_holds_the_history(accelerator):
    model, optimizer = prepared(accelerator)
    clipper = QuantileClip(model, **QUANTILE)
    accelerator.register_for_checkpointing(clipper)
    train(accelerator, model, optimizer, clipper, batches(4), True)
    accelerator.save_state()
    kept = clipper.state_dict()["states"][0]["ring"]
    train(accelerator, model, optimizer, clipper, batches(8)[4:], True)
    end = model.weight.detach().clone()
    accelerator.load_state(f"{accelerator.project_dir}/checkpoints/checkpoint_0")
    assert torch.equal(clipper.state_dict()["states"][0]["ring"], kept)
    train(accelerator, model, optimizer, clipper, batches(8)[4:], True)
    torch.testing.assert_close(model.weight.detach(), end, rtol=0, atol=0)
