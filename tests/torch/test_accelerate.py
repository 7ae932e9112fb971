"""Clippers under Accelerate: its optimizer wrapper, accumulation and checkpoints."""

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

from accelerate.utils import ProjectConfiguration  # noqa: E402

from autoclip_torch import NormClip, QuantileClip, TrustClip  # noqa: E402

QUANTILE = {"quantile": 0.5, "history_length": 8, "scope": "global"}


@pytest.fixture(autouse=True)
def own_state():
    """Accelerate has one state per process; a `Trainer` of another file leaves one."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.fixture
def accelerator(tmp_path):
    return make_accelerator(tmp_path)


def make_accelerator(folder, precision="no"):
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
    return accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        project_config=project,
        mixed_precision=precision,
    )


def prepared(accelerator, fused=False):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
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
                accelerator.unscale_gradients(optimizer)
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


def test_clipping_each_micro_batch_under_fp16_is_refused(tmp_path):
    """The scaler unscales the gradients only once in an accumulated step."""
    accelerator = make_accelerator(tmp_path, "fp16")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer = prepared(accelerator)
    clipper = QuantileClip(model, **QUANTILE)
    first, second = batches(2)
    accelerator.backward(loss_of(model, first))
    clipper.step(scaler=accelerator.scaler, optimizer=optimizer)
    accelerator.backward(loss_of(model, second))
    with pytest.raises(RuntimeError, match="when accumulating, call it once"):
        clipper.step(scaler=accelerator.scaler, optimizer=optimizer)


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "attached"])
def test_it_clips_once_per_synchronised_step(accelerator, by_hand):
    model, optimizer = prepared(accelerator)
    clipper = QuantileClip(model, **QUANTILE)
    if not by_hand:
        clipper.attach(optimizer)
    train(accelerator, model, optimizer, clipper, batches(8), by_hand)
    expected, plain_clipper = plain(8)
    assert clipper.metrics()["clip/steps"] == 4
    assert (
        clipper.metrics()["clip/clip_rate"]
        == plain_clipper.metrics()["clip/clip_rate"]
        > 0
    )
    torch.testing.assert_close(model.weight, expected.weight)


def test_trust_clip_takes_the_wrapped_optimizer(accelerator):
    """Both halves act once per synchronised step: 4 steps of at most 2 %."""
    model, optimizer = prepared(accelerator)
    clipper = TrustClip(model, optimizer)
    before = model.weight.detach().clone()
    train(accelerator, model, optimizer, clipper, batches(8), by_hand=False)
    metrics = clipper.metrics()
    assert metrics["clip/steps"] == metrics["clip/update_steps"] == 4
    assert metrics["clip/update_clip_rate"] > 0
    moved = (model.weight - before).norm() / before.norm()
    assert 0 < moved <= 1.02**4 - 1 + 1e-6


def with_scaler(accelerator, scale):
    """On a GPU fp16 comes with a scaler; on the CPU Accelerate leaves it out."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.native_amp = True
    return accelerator


HOW = pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "attached"])


@HOW
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_mixed_precision(tmp_path, precision, by_hand, fused):
    accelerator = make_accelerator(tmp_path, precision)
    if precision == "fp16":
        with_scaler(accelerator, scale=16.0)
    model, optimizer = prepared(accelerator, fused)
    clipper = QuantileClip(model, **QUANTILE)
    if not by_hand:
        clipper.attach(optimizer)
    train(accelerator, model, optimizer, clipper, batches(8), by_hand)
    _, plain_clipper = plain(8)
    ours, expected = clipper.metrics(), plain_clipper.metrics()
    assert ours["clip/steps"] == 4
    assert ours["clip/norm"] == pytest.approx(expected["clip/norm"], rel=0.02)
    assert ours["clip/norm_after"] == pytest.approx(expected["clip/norm_after"], 0.02)


@HOW
def test_an_overflow_is_not_recorded(tmp_path, by_hand):
    accelerator = with_scaler(make_accelerator(tmp_path, "fp16"), scale=2.0**17)
    model, optimizer = prepared(accelerator)
    clipper = QuantileClip(model, **QUANTILE)
    if not by_hand:
        clipper.attach(optimizer)
    start = model.weight.detach().clone()
    train(accelerator, model, optimizer, clipper, batches(2), by_hand)
    assert accelerator.optimizer_step_was_skipped
    assert torch.equal(model.weight, start)
    assert clipper.threshold().item() == torch.inf
    assert accelerator.scaler.get_scale() == 2.0**16


def test_two_optimizers(accelerator):
    torch.manual_seed(0)
    nets = [torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    nets[0], nets[1], *optimizers = accelerator.prepare(*nets, *optimizers)
    clippers = [NormClip(nets[0], max_norm=1e-3), NormClip(nets[1], max_norm=1e-2)]
    for clipper, optimizer in zip(clippers, optimizers, strict=True):
        clipper.attach(optimizer)
        accelerator.register_for_checkpointing(clipper)
    for batch in batches(8):
        with accelerator.accumulate(*nets):
            for net, optimizer in zip(nets, optimizers, strict=True):
                accelerator.backward(loss_of(net, batch))
                optimizer.step()
                optimizer.zero_grad()
    metrics = [clipper.metrics() for clipper in clippers]
    assert [m["clip/norm_after"] for m in metrics] == pytest.approx([1e-3, 1e-2])
    accelerator.save_state()
    for clipper in clippers:
        clipper.reset()
    accelerator.load_state(f"{accelerator.project_dir}/checkpoints/checkpoint_0")
    assert [c.metrics()["clip/steps"] for c in clippers] == [4, 4]


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


def train_with_another_clip(accelerator):
    model, optimizer = prepared(accelerator)
    clipper = QuantileClip(model, **QUANTILE)
    clipper.attach(optimizer)
    for batch in batches(12):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        clipper.metrics()


def test_a_clip_of_accelerate_that_was_left_in_the_loop_warns(accelerator):
    with pytest.warns(UserWarning, match=r"norms of 0\.1 again and again"):
        train_with_another_clip(accelerator)
