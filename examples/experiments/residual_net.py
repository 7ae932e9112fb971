"""A small residual network without normalisation layers, for 8 × 8 images."""

import torch
from torch import Tensor, nn

WIDTH, BLOCKS, CLASSES = 16, 6, 10


class Block(nn.Module):
    """x + f(x), f two convolutions; nothing keeps the size of x in check."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(torch.relu(x))))


class ResidualNet(nn.Module):
    """Stem, residual blocks on 4 × 4 positions, mean over positions, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Linear(WIDTH, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).relu().mean(dim=(2, 3)))
