"""Models that train: the shapes of `models.py`, with a forward pass and one batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from shares import SMALLEST

BATCH = 8


class Training(NamedTuple):
    """A model, and the loss of one batch."""

    model: nn.Module
    loss: Callable[[], Tensor]


class WordModel(nn.Module):
    """Two LSTM layers over 20 words."""

    def __init__(self, words: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, inputs)
        self.layers = nn.LSTM(inputs, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, words)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(words))[0])


class Decoder(nn.Module):
    """A GPT: causal transformer layers between tied embeddings."""

    def __init__(self, words: int, places: int, width: int, layers: int) -> None:
        super().__init__()
        self.words, self.places = (
            nn.Embedding(words, width),
            nn.Embedding(places, width),
        )
        heads, inner = max(1, width // 64), 4 * width
        options = {"activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, heads, inner, 0.0, **options)
        self.layers = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, words: Tensor) -> Tensor:
        length = words.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        inputs = self.words(words) + self.places(torch.arange(length))
        return self.layers(inputs, mask=mask, is_causal=True) @ self.words.weight.T


class Bottleneck(nn.Module):
    """A residual block of three convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch = nn.Sequential(
            *(_convolution(inputs, width, 1), nn.ReLU()),
            *(_convolution(width, width, 3, stride), nn.ReLU()),
            _convolution(width, outputs, 1),
        )
        is_same = inputs == outputs and stride == 1
        same, other = nn.Identity(), _convolution(inputs, outputs, 1, stride)
        self.shortcut = same if is_same else other

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.branch(x) + self.shortcut(x))


def lstm() -> Training:
    """Return a word model with 1.0M parameters, 16 sequences of 20 words."""
    return _predict_words(WordModel(500, 64, 256), 500, 16, 20)


def gpt() -> Training:
    """Return a decoder with 46M parameters, 8 sequences of 128 words."""
    return _predict_words(Decoder(16_000, 512, 512, 12), 16_000, BATCH, 128)


def linear() -> Training:
    """Return a layer with 10 500 parameters in 2 tensors."""
    layer = nn.Linear(20, 500)
    x, labels = torch.randn(16, 20), torch.randint(500, (16,))
    return Training(layer, lambda: functional.cross_entropy(layer(x), labels))


def tiny() -> Training:
    """Return a small decoder, to try the benchmark."""
    return _predict_words(Decoder(20, 8, 16, 1), 20, 2, 4)


def resnet50() -> Training:
    """Return ResNet-50, 8 images of 224 × 224."""
    start = [_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks, inputs = [], 64
    for width, count in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for index in range(count):
            stride = 2 if index == 0 and width > 64 else 1
            blocks.append(Bottleneck(inputs, width, stride))
            inputs = 4 * width
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    model = nn.Sequential(*start, *blocks, *end)
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,))
    return Training(model, lambda: functional.cross_entropy(model(images), labels))


MODELS: dict[str, Callable[[], Training]] = {
    "LSTM": lstm,
    "ResNet-50": resnet50,
    "GPT": gpt,
    SMALLEST: linear,
}


def _predict_words(model: nn.Module, words: int, rows: int, length: int) -> Training:
    """Return the training of a model that predicts random words."""
    text = torch.randint(words, (rows, length + 1))

    def loss() -> Tensor:
        scores = model(text[:, :-1]).flatten(0, 1)
        return functional.cross_entropy(scores, text[:, 1:].flatten())

    return Training(model, loss)


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    """Return a convolution and its normalisation."""
    padding = size // 2
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
