"""The tasks of `labelled_series.py`: nets of seven kinds, of about 400 steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tasks
from problems import Problem
from tasks import OPTIMIZERS as OPTIMIZERS
from text_model import load_text, sample


class LstmModel(nn.Module):
    """An LSTM that predicts the next byte."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, 24)
        self.cell = nn.LSTM(24, 64, batch_first=True)
        self.head = nn.Linear(64, symbols)

    def forward(self, bytes_: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(bytes_))[0])


def lstm(seed: int, _: int) -> Problem:
    """Return a byte language model with an LSTM."""
    text, test, symbols = load_text()
    generator, model = torch.Generator().manual_seed(seed), LstmModel(symbols)
    stretches = sample(test, 64, torch.Generator().manual_seed(0))
    shares = torch.bincount(text, minlength=symbols) + 1.0
    unigram = (shares / shares.sum()).log()[stretches[:, 1:]].mean()

    def loss_of(x: Tensor) -> Tensor:
        logits = model(x[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, x[:, 1:].flatten())

    return Problem(
        model,
        lambda step: loss_of(sample(text, 8, generator)),
        lambda: loss_of(stretches),
        -float(unigram),
    )


@dataclass(frozen=True)
class Task:
    """A problem with its number of steps and the good rate under each optimizer."""

    make: Callable[..., Problem]
    steps: int
    rates: tuple[float, float, float]
    can_sample: bool = True
    """Whether a step may draw several batches."""
    is_slow: bool = False
    """Whether only every second fault is tried."""
    has_float16: bool = True
    """Whether the CPU has its operations in float16."""
    has_late_test: bool = False
    """Whether the test is of the run's second half alone."""
    threshold: float | None = None
    """The constant threshold of a task that needs one."""


def task(name: str, steps: int, **settings: Any) -> Task:
    """Return a task of the benchmark with another number of steps."""
    made = tasks.TASKS[name]
    return Task(made.make, steps, made.rates, **settings)


TASKS: dict[str, Task] = {
    "byte transformer": task("byte model", 200, is_slow=True),
    "byte LSTM": Task(lstm, 240, (1.0, 0.3, 0.01), has_float16=False),
    "residual net": task("residual net", 200, is_slow=True),
    "conv net": task("conv net", 300),
    "vision transformer": task("vision transformer", 240, is_slow=True),
    "MLP": task("MLP, faults", 600),
    "autoencoder": task("autoencoder", 600),
    "recurrent net": task("temporal order", 400, can_sample=False, has_float16=False),
    "heavy tails": task("heavy tails × 1", 1000, can_sample=False, threshold=3.0),
    "fine-tuning": task("fine-tuning", 500, has_late_test=True),
}


def find_rate(name: str, optimizer: str) -> float:
    """Return the good rate of a task under an optimizer."""
    return TASKS[name].rates[list(OPTIMIZERS).index(optimizer)]
