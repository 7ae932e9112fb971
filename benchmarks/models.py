"""The gradients that are clipped: the parameters' shapes of five networks.

Clipping costs what the sizes and the number of the tensors make it cost, so shapes are
all that is needed: no download, no forward pass. Weights and gradients are random.
"""

import math
from collections.abc import Callable, Iterator

import torch

Shape = tuple[int, ...]


def lstm() -> Iterator[Shape]:
    """Yield 1.0M parameters in 11 tensors: a word model with two recurrent layers."""
    words, inputs, hidden = 500, 64, 256
    yield words, inputs
    for size in (inputs, hidden):
        yield from [(4 * hidden, size), (4 * hidden, hidden)]
        yield from [(4 * hidden,)] * 2
    yield from [(words, hidden), (words,)]


def resnet50() -> Iterator[Shape]:
    """Yield 25.6M parameters in 161 tensors: ResNet-50 for 1000 classes."""
    yield from _convolution(3, 64, 7)
    inputs = 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            yield from _convolution(inputs, width, 1)
            yield from _convolution(width, width, 3)
            yield from _convolution(width, 4 * width, 1)
            if block == 0:  # the shortcut changes the number of channels
                yield from _convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    yield from [(1000, inputs), (1000,)]


def gpt() -> Iterator[Shape]:
    """Yield 46M parameters in 148 tensors: a decoder of 12 layers, tied embeddings."""
    words, places, width = 16_000, 512, 512
    yield from [(words, width), (places, width)]
    for _ in range(12):
        yield from [(width,)] * 2
        yield from [(3 * width, width), (3 * width,), (width, width), (width,)]
        yield from [(width,)] * 2
        yield from [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    yield from [(width,)] * 2


def perceptron() -> Iterator[Shape]:
    """Yield 7000 parameters in 6 tensors: three layers."""
    for inputs, outputs in [(64, 64), (64, 32), (32, 10)]:
        yield from [(outputs, inputs), (outputs,)]


def small() -> Iterator[Shape]:
    """Yield 0.5M parameters in 2000 tensors: what a call costs."""
    for _ in range(1000):
        yield from [(32, 15), (32,)]


def tiny() -> Iterator[Shape]:
    """Yield a few small tensors, to try the benchmark itself."""
    yield from [(8, 4), (8,), (3, 8, 2, 2), (3,)]


MODELS: dict[str, Callable[[], Iterator[Shape]]] = {
    "LSTM": lstm,
    "ResNet-50": resnet50,
    "GPT": gpt,
    "6 small": perceptron,
    "2000 small": small,
}


def make_parameters(shapes: Iterator[Shape]) -> list[torch.nn.Parameter]:
    """Return parameters of these shapes: random weights, each with a gradient."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        weights = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        parameters.append(torch.nn.Parameter(weights))
        parameters[-1].grad = torch.zeros_like(weights)
    return parameters


@torch.no_grad()
def set_gradients(parameters: list[torch.nn.Parameter], factor: float) -> None:
    """Make each gradient `factor` times its weight, in the memory it has.

    The last comes first, as in a backward pass: the first is still in the cache.
    """
    for parameter in reversed(parameters):
        torch.mul(parameter, factor, out=parameter.grad)


def _convolution(inputs: int, outputs: int, size: int) -> Iterator[Shape]:
    """Yield a convolution's kernel, and gain and bias of the normalisation after it."""
    yield outputs, inputs, size, size
    yield from [(outputs,)] * 2
