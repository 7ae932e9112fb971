"""Two clippers in a GAN: generator and discriminator each have a history of their own.

The data are four spots on a circle. Run it: `python examples/gan.py`.
"""

import argparse

import torch
from torch import Tensor, nn

from autoclip_torch import QuantileClip

CENTERS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
BATCH, NOISE = 128, 4


def real() -> Tensor:
    spots = CENTERS[torch.randint(len(CENTERS), (BATCH,))]
    return spots + 0.1 * torch.randn(BATCH, 2)


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, 64), nn.LeakyReLU(0.2)),
        *(nn.Linear(64, 64), nn.LeakyReLU(0.2)),
        nn.Linear(64, outputs),
    )


class Player:
    """A network, its optimizer, and the clipper that is attached to it."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        self.network = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr, betas=(0.5, 0.9))
        self.clipper = QuantileClip(
            network, quantile=0.9, history_length=200, scope="global"
        )
        self.clipper.attach(self.optimizer)

    def minimize(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()  # clips first


def train(steps: int) -> tuple[Player, Player]:
    generator = Player(network(NOISE, 2), lr=1e-3)
    discriminator = Player(network(2, 1), lr=2e-3)
    judge, softplus = discriminator.network, nn.functional.softplus
    for _ in range(steps):
        fake = generator.network(torch.randn(BATCH, NOISE))
        # The generator's gradients reach the judge too; zero_grad drops them there.
        on_real, on_fake = judge(real()), judge(fake.detach())
        discriminator.minimize((softplus(-on_real) + softplus(on_fake)).mean())
        generator.minimize(softplus(-judge(fake)).mean())
    return generator, discriminator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.manual_seed(0)
    generator, discriminator = train(options.steps)
    with torch.no_grad():
        points = generator.network(torch.randn(1000, NOISE))
    distance, spot = torch.cdist(points, CENTERS).min(dim=1)
    shares = ", ".join(f"{n / 1000:.0%}" for n in spot.bincount(minlength=4).tolist())
    print(f"{(distance < 0.4).float().mean():.0%} at a spot; by spot: {shares}")
    players = {"generator": generator, "discriminator": discriminator}
    for name, player in players.items():
        metrics = player.clipper.metrics()
        print(
            f"{name:13} clipped {metrics['clip/clip_rate']:.0%} of "
            f"{metrics['clip/steps']:.0f} steps, now at {metrics['clip/threshold']:.2f}"
        )


if __name__ == "__main__":
    main()
