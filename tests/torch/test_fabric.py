"""Clippers under Lightning Fabric: its wrappers, its precision, its checkpoints."""

import pytest
import torch

fabric = pytest.importorskip("lightning.fabric")

from autoclip_torch import NormClip  # noqa: E402

LIMIT = 1e-3


def step(launched, model, optimizer, clipper, by_hand):
    """Take one step of SGD with learning rate 1; return the length of the update."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    launched.backward(model(torch.full((4, 3), 100.0)).sum())
    if by_hand:
        clipper.step()
    optimizer.step()
    moved = [
        (p - old).flatten() for p, old in zip(model.parameters(), before, strict=True)
    ]
    return torch.cat(moved).norm().item()


@pytest.mark.parametrize("how", ["by hand", "attached", "fused"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(tmp_path, how, precision):
    launched = fabric.Fabric(accelerator="cpu", precision=precision)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=how == "fused")
    model, optimizer = launched.setup(model, optimizer)
    clipper = NormClip(model, max_norm=LIMIT)
    if how != "by hand":
        clipper.attach(optimizer)
    moved = step(launched, model, optimizer, clipper, how == "by hand")
    assert moved == pytest.approx(LIMIT, rel=1e-3)
    state = {"model": model, "optimizer": optimizer, "clipper": clipper}
    launched.save(tmp_path / "state.ckpt", state)
    clipper.reset()
    launched.load(tmp_path / "state.ckpt", state)
    assert clipper.metrics()["clip/steps"] == 1
