"""Clippers in the training step of timm: with its scaler, in place of its modes."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from autoclip_torch import AGC, NormClip, QuantileClip, ValueClip

pytestmark = pytest.mark.needs("peers")
LIMIT = 1e-3


@pytest.fixture
def timm(monkeypatch):
    """Return three files of timm: the whole package imports torchvision."""
    folder = importlib.util.find_spec("timm").submodule_search_locations[0]
    for name in ("timm", "timm.utils"):
        package = types.ModuleType(name)
        package.__path__ = [f"{folder}{name.removeprefix('timm').replace('.', '/')}"]
        monkeypatch.setitem(sys.modules, name, package)
    names = ("timm.utils.agc", "timm.utils.clip_grad", "timm.utils.cuda")
    modules = [importlib.import_module(name) for name in names]
    for name in names:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return modules


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv1d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 1)
    )


def batches(steps=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 2, 6, generator=generator) * 3**i for i in range(steps)]


def train_one_epoch(model, optimizer, scaler, data, accumulated=1, **clipping):
    """The step of timm's `train.py`: `need_update` at the end of an accumulation."""
    for index, batch in enumerate(data):
        loss = (model(batch) ** 2).mean() / accumulated
        need_update = (index + 1) % accumulated == 0
        scaler(loss, optimizer, need_update=need_update, **clipping)
        if need_update:
            optimizer.zero_grad()


def test_an_attached_clipper_clips_unscaled_gradients_in_timms_scaler(timm):
    """Accumulated batches are one step; their norm has no loss scale."""
    *_, amp = timm
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipper = QuantileClip(model, quantile=0.5, scope="global")
    clipper.attach(optimizer)
    scaler = amp.NativeScaler(device="cpu")
    train_one_epoch(model, optimizer, scaler, batches(), accumulated=2)
    plain, expected = make_model(), []
    for pair in zip(batches()[::2], batches()[1::2], strict=True):
        for batch in pair:
            ((plain(batch) ** 2).mean() / 2).backward()
        gradients = [p.grad for p in plain.parameters()]
        expected.append(torch.nn.utils.get_total_norm(gradients).item())
        plain.zero_grad()
    ring = clipper.state_dict()["states"][0]["ring"][0]
    assert ring[:2].tolist() == pytest.approx(expected, rel=1e-4)


MODES = {"norm": NormClip, "value": ValueClip, "agc": AGC}


@pytest.mark.parametrize("mode", MODES)
def test_a_clipper_replaces_a_clip_mode_of_timm(timm, mode):
    *_, amp = timm
    theirs, ours = make_model(), make_model()
    for model, has_clipper in ((theirs, False), (ours, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = amp.NativeScaler(device="cpu")
        if has_clipper:
            scope = {"scope": "global"} if mode == "norm" else {}
            MODES[mode](model, LIMIT, **scope).attach(optimizer)
            train_one_epoch(model, optimizer, scaler, batches())
        else:
            clipping = {"clip_grad": LIMIT, "clip_mode": mode}
            parameters = list(model.parameters())
            train_one_epoch(
                model, optimizer, scaler, batches(), parameters=parameters, **clipping
            )
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
