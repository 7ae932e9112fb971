"""What the benchmark trains: a model, its loss at a step, and its loss on a test.

Here are the problems on text, sound, sequences and streams; those on images are in
`digit_problems.py`. Labels of a class are smoothed by 0.1, in training and in the test.
The loss of a perfect classifier is then about 0.5, not 0, so that a per cent of the
loss means as much as in the other tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heavy_tails import INPUTS, make_stream
from separation import LOSSES, Batch, Separator
from temporal_task import CLASSES, HIDDEN, SYMBOLS, make_batch, start_of
from text_model import Transformer, load_text, loss_of, sample
from voices import make_mixtures


@dataclass(frozen=True)
class Problem:
    """One seed's model and data."""

    model: nn.Module
    loss: Callable[[int], Tensor]
    """The training loss at a step, counted from 0."""
    test: Callable[[], Tensor]
    level: float
    """The test loss of a predictor that ignores its input."""


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy with smoothed labels."""
    return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


def bytes_of_text(seed: int, steps: int) -> Problem:
    """Return the byte language model of `language_model.py`."""
    text, test, symbols = load_text()
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(symbols)
    stretches = sample(test, 128, torch.Generator().manual_seed(0))
    shares = torch.bincount(text, minlength=symbols) + 1.0
    unigram = (shares / shares.sum()).log()[stretches[:, 1:]].mean()
    return Problem(
        model,
        lambda step: loss_of(model, sample(text, 8, generator)),
        lambda: loss_of(model, stretches),
        -float(unigram),
    )


class OrderNet(nn.Module):
    """The recurrent network of the temporal-order task, with its sparse start."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.cell = nn.RNN(SYMBOLS, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)
        start = start_of(seed)
        weights = {
            "cell.weight_ih_l0": start.inputs.T,
            "cell.weight_hh_l0": start.recurrent.T,
            "head.weight": start.outputs.T,
        }
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                value = weights.get(name, np.zeros(parameter.shape))
                parameter.copy_(torch.from_numpy(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][-1])


@cache
def order_batches(seed: int, steps: int) -> Any:
    """Return the training batches and the test of the temporal-order task, 20 long."""
    rng = np.random.default_rng([seed, 2])
    made = [make_batch(rng, 20, 20) for _ in range(steps)]
    made.append(make_batch(rng, 20, 500))
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in made]


def temporal_order(seed: int, steps: int) -> Problem:
    """Return the temporal-order task of `temporal_order.py`."""
    model, data = OrderNet(seed), order_batches(seed, steps)

    def loss(step: int) -> Tensor:
        x, y = data[step]
        return smoothed(model(x), y)

    return Problem(model, loss, lambda: loss(-1), float(np.log(CLASSES)))


def heavy_tails(seed: int, steps: int, scale: float) -> Problem:
    """Return the regression of `heavy_tails.py`; the test has noise and no garbage.

    The test loss is the mean absolute error divided by the scale, because the squared
    error of this noise has no mean.
    """
    stream = make_stream(seed, steps, corrupted=0.05)
    x = torch.from_numpy(stream.inputs).float()
    y = torch.from_numpy(scale * stream.labels).float()
    rng = np.random.default_rng([seed, 1])
    inputs = rng.normal(size=(2000, INPUTS))
    labels = inputs @ stream.truth + rng.standard_t(1.5, size=2000)
    test_x, test_y = torch.from_numpy(inputs).float(), torch.from_numpy(labels).float()
    model = nn.Linear(INPUTS, 1, bias=False)
    nn.init.zeros_(model.weight)
    return Problem(
        model,
        lambda step: 0.5 * (model(x[step]) - y[step]).square().mean(),
        lambda: (model(test_x)[:, 0] / scale - test_y).abs().mean(),
        float(test_y.abs().mean()),
    )


@cache
def speech(seed: int, count: int) -> Batch:
    """Return mixtures of a quarter of a second, and their spectra."""
    return Batch.of(make_mixtures(seed, count, 1000))


def speech_loss(seed: int, steps: int, name: str) -> Problem:
    """Return a loss of `speech_losses.py`; its test compares with constant outputs."""
    training, test = speech(0, 100), speech(1, 40)
    generator = torch.Generator().manual_seed(seed)
    model, loss_of_output = Separator(), LOSSES[name]

    def loss(step: int) -> Tensor:
        chosen = torch.randint(100, (8,), generator=generator)
        batch = Batch(*(part[chosen] for part in training))
        return loss_of_output(*model(batch.mixed_spectra), batch)

    with torch.no_grad():
        masks, places = model(test.mixed_spectra)
        places = nn.functional.one_hot(torch.zeros_like(places[..., 0]).long(), 8)
        constant = loss_of_output(torch.full_like(masks, 0.5), places.float(), test)
    return Problem(
        model,
        loss,
        lambda: loss_of_output(*model(test.mixed_spectra), test),
        float(constant),
    )


HORIZON, EPISODES = 15, 32


def control(seed: int, steps: int) -> Problem:
    """Return a reinforcement-learning loop: REINFORCE steers a point to the origin.

    The state is place and speed, the action a push in [-1, 1] with Gaussian noise, the
    cost of a moment place² + 0.1 · push². The test runs the policy without its noise;
    its level is the cost of no push.
    """
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1), nn.Tanh())
    policy: Callable[[Tensor], Tensor] = model

    def episodes(policy: Any, count: int, noise: float, generator: Any) -> Any:
        state = torch.randn(count, 2, generator=generator)
        noises = torch.randn(HORIZON, 3, count, generator=generator)
        states, pushes, costs = [], [], []
        for pushing, *drift in noises:
            push = policy(state)[:, 0] + noise * pushing
            states.append(state)
            pushes.append(push)
            applied = push.clamp(-1, 1)
            costs.append(state[:, 0].square() + 0.1 * applied.square())
            speed = 0.95 * state[:, 1] + 0.5 * applied + 0.1 * drift[0]
            place = state[:, 0] + 0.3 * speed + 0.1 * drift[1]
            state = torch.stack([place, speed], dim=1)
        return torch.stack(states), torch.stack(pushes), torch.stack(costs)

    def loss(step: int) -> Tensor:
        with torch.no_grad():
            states, pushes, costs = episodes(policy, EPISODES, 0.3, generator)
            costs_to_go = costs.flip(0).cumsum(0).flip(0)
            advantage = costs_to_go - costs_to_go.mean(dim=1, keepdim=True)
        log_probability = -(pushes - model(states)[..., 0]).square() / (2 * 0.3**2)
        return (advantage * log_probability).mean()

    def mean_cost(policy: Any) -> Tensor:
        return episodes(policy, 500, 0.0, torch.Generator().manual_seed(0))[2].mean()

    level = float(mean_cost(lambda state: torch.zeros(len(state), 1)))
    return Problem(model, loss, lambda: mean_cost(policy), level)
