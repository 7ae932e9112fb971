"""Real text that comes with Python, and a small transformer that predicts its bytes."""

from functools import cache
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONTEXT, WIDTH, HEADS, LAYERS = 48, 48, 4, 2


@cache
def load_text() -> tuple[Tensor, Tensor, int]:
    """Return training and test bytes of Python's help texts, renumbered, and the count.

    Topics are in alphabetical order; every tenth is for the test.
    """
    texts = [topics[name].encode() for name in sorted(topics)]
    train = b"\n".join(t for i, t in enumerate(texts) if i % 10)
    test = b"\n".join(texts[::10])
    known, numbers = np.unique(
        np.frombuffer(train + test, np.uint8), return_inverse=True
    )
    numbers = torch.from_numpy(numbers)
    return numbers[: len(train)], numbers[len(train) :], len(known)


def sample(text: Tensor, count: int, generator: Any) -> Tensor:
    """Return random stretches of CONTEXT + 1 bytes."""
    starts = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


class Transformer(nn.Module):
    """Learned positions, pre-norm blocks with causal attention, a linear head."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, symbols)

    def forward(self, bytes_: Tensor) -> Tensor:
        x = self.embed(bytes_) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention, then a hidden layer, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        split = self.qkv(self.first(x)).view(batch, steps, 3, HEADS, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, steps, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def loss_of(model: Transformer, stretches: Tensor) -> Tensor:
    """Return the cross-entropy of the next byte, in nats."""
    logits = model(stretches[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten())
