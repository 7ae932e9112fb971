"""The benchmark's problems on scikit-learn's digits: images of 8 × 8 pixels."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from agc_batch import load_images
from problems import Problem, smoothed
from residual_net import ResidualNet

CLASSES = 10
WIDTH, PATCHES = 32, 16


def conv_net() -> nn.Module:
    """Return two convolutions, the mean over positions, and a head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES)),
    )


def mlp() -> nn.Module:
    """Return three linear layers."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU()),
        *(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


class VisionTransformer(nn.Module):
    """Patches of 2 × 2 pixels, positions that start at 0, two pre-norm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.place = nn.Parameter(torch.zeros(PATCHES, WIDTH))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT + self.place
        return self.head(self.norm(self.blocks(tokens).mean(dim=1)))


def classify(
    seed: int, steps: int, make_model: Callable[[], nn.Module], batch: int = 64
) -> Problem:
    """Return the classification of digits by a network."""
    train_x, train_y, test_x, test_y = load_images()
    generator, model = torch.Generator().manual_seed(seed), make_model()

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(train_x), (batch,), generator=generator)
        return smoothed(model(train_x[chosen]), train_y[chosen])

    return Problem(
        model, loss, lambda: smoothed(model(test_x), test_y), math.log(CLASSES)
    )


def residual(seed: int, steps: int) -> Problem:
    """Return the residual network without normalisation of `agc_batch.py`."""
    return classify(seed, steps, ResidualNet, batch=32)


def fine_tuning(seed: int, steps: int) -> Problem:
    """Return an MLP whose images are turned, and whose loss is ten times larger, later.

    The first half of the steps is the pretraining. The test has turned images.
    """
    train_x, train_y, test_x, test_y = load_images()
    generator, model = torch.Generator().manual_seed(seed), mlp()
    turned_x, turned_test = (x.rot90(1, (2, 3)) for x in (train_x, test_x))

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(train_x), (64,), generator=generator)
        if step < steps // 2:
            return smoothed(model(train_x[chosen]), train_y[chosen])
        return 10 * smoothed(model(turned_x[chosen]), train_y[chosen])

    return Problem(
        model, loss, lambda: smoothed(model(turned_test), test_y), math.log(CLASSES)
    )


def autoencoder(seed: int, steps: int) -> Problem:
    """Return an autoencoder with eight values in the middle; its loss is the MSE."""
    train_x, _, test_x, _ = load_images()
    train_x, test_x = train_x.flatten(1), test_x.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8)),
        *(nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, 64)),
    )

    def loss(step: int) -> Tensor:
        x = train_x[torch.randint(len(train_x), (64,), generator=generator)]
        return nn.functional.mse_loss(model(x), x)

    level = float((test_x - train_x.mean(dim=0)).square().mean())
    return Problem(
        model, loss, lambda: nn.functional.mse_loss(model(test_x), test_x), level
    )
