"""Finding a threshold changes neither the model nor gradients nor random numbers."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoclip_torch import find_clipping_threshold

mse = nn.functional.mse_loss


def a_model():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)]
    model = nn.Sequential(*layers)
    model[0].weight.grad = torch.full((8, 4), 0.25)
    model[1].eval()  # its mode differs from the others
    return model


def loader(generator=None, batch_size=8):
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    return DataLoader(data, batch_size, shuffle=True, generator=generator)


def everything(model, optimizer, generator):
    """Return all that must stay unchanged, as plain values."""
    return copy.deepcopy(
        [
            {k: v.tolist() for k, v in model.state_dict().items()},
            [p.grad if p.grad is None else p.grad.tolist() for p in model.parameters()],
            [module.training for module in model.modules()],
            [str(optimizer.state_dict())],
            [torch.get_rng_state().tolist(), generator.get_state().tolist()],
            [random.getstate(), np.random.get_state()[1].tolist()],  # noqa: NPY002
        ]
    )


@pytest.mark.parametrize("fails", [False, True])
def test_finding_a_threshold_changes_nothing(fails):
    model, generator = a_model(), torch.Generator().manual_seed(3)
    model.train()
    optimizer = torch.optim.Adam(model.parameters())
    calls = []

    def loss(output, target):
        calls.append((random.random(), np.random.rand()))  # noqa: NPY002
        if fails and len(calls) == 3:
            raise ArithmeticError("stop")
        return mse(output, target)

    data = loader(generator)
    before, grad = everything(model, optimizer, generator), model[0].weight.grad
    buffer = model[1].running_mean
    if fails:
        with pytest.raises(ArithmeticError, match="stop"):
            find_clipping_threshold(model, data, loss)
    else:
        assert find_clipping_threshold(model, data, loss).steps == 5
    assert everything(model, optimizer, generator) == before
    assert model[0].weight.grad is grad
    assert model[3].weight.grad is None
    assert model[1].running_mean is buffer


def test_the_norms_are_those_of_the_whole_gradient():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    data = DataLoader(TensorDataset(torch.randn(40, 4), torch.randn(40, 1)), 8)
    norms = []
    for inputs, target in data:
        grads = torch.autograd.grad(mse(model(inputs), target), model.parameters())
        norms.append(torch.cat([g.flatten() for g in grads]).double().norm().item())
    suggestion = find_clipping_threshold(model, data, mse)
    assert suggestion.max == pytest.approx(max(norms), rel=1e-6)
    assert suggestion.mean == pytest.approx(np.mean(norms), rel=1e-6)
    assert find_clipping_threshold(model, data, mse, num_batches=2).steps == 2


def test_a_batch_may_be_a_dict_and_no_grad_may_be_on():
    class Model(nn.Linear):
        def forward(self, x, y):
            return {"loss": mse(super().forward(x), y)}

    batches = [{"x": torch.ones(2, 4), "y": torch.ones(2, 1)}] * 3
    with torch.no_grad():
        suggestion = find_clipping_threshold(
            Model(4, 1), batches, lambda out, _: out["loss"]
        )
    assert suggestion.steps == 3


@pytest.mark.parametrize(
    ("batches", "count", "error", "words"),
    [
        ([], 3, ValueError, "dataloader must yield at least one batch"),
        ([torch.ones(2, 4)], 3, TypeError, "must yield pairs .* got Tensor"),
        ([], 0, ValueError, "num_batches must be a whole number >= 1, got 0"),
    ],
    ids=["empty", "tensor", "none"],
)
def test_bad_input_is_named(batches, count, error, words):
    with pytest.raises(error, match=words):
        find_clipping_threshold(nn.Linear(4, 1), batches, mse, count)


def test_a_generator_behind_a_batch_sampler_and_an_empty_buffer_stay():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.register_buffer("counter", None)

        def forward(self, x):
            self.counter = torch.ones(1)
            return self.layer(x)

    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.randn(12, 1))
    order = torch.utils.data.RandomSampler(data, generator=generator)
    batches = torch.utils.data.BatchSampler(order, 4, drop_last=False)
    loader = torch.utils.data.DataLoader(data, batch_sampler=batches)
    model, before = Counting(), generator.get_state()
    find_clipping_threshold(model, loader, nn.functional.mse_loss, num_batches=2)
    assert torch.equal(generator.get_state(), before)
    assert model.counter is None
