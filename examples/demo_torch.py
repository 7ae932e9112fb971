"""One training run of the demo in PyTorch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from autoclip_core import ClipLog
from autoclip_torch import (
    AGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    TrustClip,
    ZClip,
)
from demo_task import (
    BATCH,
    FIXED,
    HIDDEN,
    Method,
    Run,
    initial_weights,
    rate_at,
    tests_after,
)
from digits_data import CLASSES, INPUTS, batches, load


class Reader(nn.Module):
    """A ReLU network that reads a sequence and then names the digit."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(INPUTS, HIDDEN, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(HIDDEN, CLASSES)
        start = initial_weights(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.rnn.weight_ih_l0.copy_(torch.from_numpy(start["inputs"].T))
            self.rnn.weight_hh_l0.copy_(torch.from_numpy(start["recurrent"].T))
            self.head.weight.copy_(torch.from_numpy(start["outputs"].T))

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        return self.head(states[:, -1])


def make_clipper(
    method: Method, model: nn.Module, optimizer: Optimizer
) -> Clipper | TrustClip:
    """Return the method's clipper; without clipping it only observes (`dry_run`)."""
    if method.clipper == "trust":
        return TrustClip(model, optimizer)
    if not method.clips:
        return NormClip(model, max_norm=FIXED, dry_run=True)
    if method.clipper == "fixed":
        return NormClip(model, max_norm=FIXED)
    if method.clipper == "quantile":
        return QuantileClip(model, quantile=0.9, global_clipping=True)
    if method.clipper == "median":
        return QuantileClip(model, quantile=0.5, global_clipping=True)
    if method.clipper == "mean_std":
        return StandardClip(model, deviations=2.0, global_clipping=True)
    if method.clipper == "agc":
        return AGC(model, clipping=0.01, exclude="head")  # as its paper does
    if method.clipper == "zclip":
        return ZClip(model)
    raise ValueError(f"the demo has no clipper for {method.clipper!r}")


def take_step(clipper: Clipper | TrustClip, optimizer: Optimizer) -> Any:
    """Change the weights, and return what the log records of the gradient."""
    if isinstance(clipper, TrustClip):  # it clips within the optimizer's step
        optimizer.step()
        return clipper.metrics()
    decision = clipper.step()
    optimizer.step()
    return decision


def train(method: Method, seed: int, steps: int) -> Run:
    """Train one network on one core and return what happened."""
    torch.set_num_threads(1)
    digits = [torch.from_numpy(array) for array in load()]
    train_x, train_y, test_x, test_y = digits
    model = Reader(seed)
    optimizer = SGD(model.parameters(), lr=method.rate)
    clipper = make_clipper(method, model, optimizer)
    log, losses, accuracies = ClipLog(), [], []
    for step, batch in enumerate(batches(seed, steps, BATCH)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(train_x[batch]), train_y[batch])
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, method)
        log.record(take_step(clipper, optimizer))
        losses.append(loss.item())
        if tests_after(step, steps):
            accuracies.append(accuracy(model, test_x, test_y))
    return Run(
        method,
        seed,
        losses=np.array(losses),
        norms=log.norms,
        thresholds=log.thresholds,
        clipped=log.clipped,
        finite=log.finite,
        accuracies=np.array(accuracies),
    )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the fraction of images that are named rightly."""
    return float((model(x).argmax(dim=1) == y).float().mean())
