"""Clip the decoder of an encoder–decoder with attention, and leave the encoder alone.

The task is to reverse digits. One batch in twenty is eight times as long, and so is its
summed loss, and its gradient. Run it: `python examples/seq2seq.py`; then with
`--clip both`, where encoder and decoder have a clipper each, and with `--clip none`.
"""

import argparse

import torch
from torch import Tensor, nn

from autoclip_torch import QuantileClip

DIGITS, BATCH, WIDTH = 10, 64, 48
START = DIGITS  # what the decoder reads before the first digit
PARTS = {"none": [], "decoder": ["decoder"], "both": ["encoder", "decoder"]}


class Encoder(nn.Module):
    """Reads the digits in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS, WIDTH)
        self.rnn = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)

    def forward(self, digits: Tensor) -> Tensor:
        return self.rnn(self.embed(digits))[0]


class Decoder(nn.Module):
    """Predicts each digit from the ones before it and what it attends to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS + 1, WIDTH)
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.predict = nn.Linear(2 * WIDTH, DIGITS)

    def forward(self, before: Tensor, encoded: Tensor) -> Tensor:
        state = self.rnn(self.embed(before))[0]
        query = self.query(state)
        seen = nn.functional.scaled_dot_product_attention(query, encoded, encoded)
        return self.predict(torch.cat([state, seen], dim=-1))


class Reverser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, digits: Tensor, target: Tensor) -> Tensor:
        start = torch.full((len(target), 1), START)
        before = torch.cat([start, target[:, :-1]], dim=1)
        return self.decoder(before, self.encoder(digits))


def batch(length: int) -> tuple[Tensor, Tensor]:
    digits = torch.randint(DIGITS, (BATCH, length))
    return digits, digits.flip(1)


def train(clip: str, steps: int) -> tuple[Reverser, dict[str, QuantileClip]]:
    model = Reverser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # Each has a history of its own. To exclude a part on purpose causes no warning.
    others = {"encoder": "decoder", "decoder": "encoder"}
    clippers = {
        part: QuantileClip(model, quantile=0.5, scope="global", exclude=others[part])
        for part in PARTS[clip]
    }
    for step in range(steps):
        digits, target = batch(length=40 if step % 20 == 10 else 5)
        logits = model(digits, target)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="sum"
        )
        optimizer.zero_grad()
        (loss / BATCH).backward()
        for clipper in clippers.values():
            clipper.step()
        optimizer.step()
    return model, clippers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", choices=PARTS, default="decoder")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, clippers = train(options.clip, options.steps)
    digits, target = batch(length=5)
    right = (model(digits, target).argmax(-1) == target).float().mean()
    print(f"clip {options.clip}: {right:.1%} of new digits right")
    for part, clipper in clippers.items():
        metrics = clipper.metrics()
        print(
            f"{part:8} clipped {metrics['clip/clip_rate']:.0%} of "
            f"{metrics['clip/steps']:.0f} steps, now at {metrics['clip/threshold']:.2f}"
        )


if __name__ == "__main__":
    main()
