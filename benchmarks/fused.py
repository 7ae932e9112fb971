"""Time a fused AdamW whose clipper is attached: the clip rides in its kernel.

Run it as `python benchmarks/fused.py`. The bar: the step alone, and one read of every
gradient on top.
"""

import argparse
from typing import Any

import torch

from autoclip_torch import NormClip, QuantileClip
from contenders import HISTORY, Contender, reader
from models import MODELS, make_parameters
from timing import alternate, spread


def main() -> None:
    """Print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="per model")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(2)
    for name in ("lstm", "resnet50", "gpt"):
        times = alternate(make_contenders(name), lambda contender: None, seconds)
        alone, read = times["fused AdamW"], times["one read"]
        bar = [1.1 * (a + r) for a, r in zip(alone, read, strict=True)]
        print(
            f"\n{name}, {len(alone)} rounds{'ms':>24}{'to the bar':>12}{'':5}quartiles"
        )
        for contender, own in times.items():
            middle = spread([1e3 * seconds for seconds in own]).median
            low, ratio, high = spread(
                [mine / most for mine, most in zip(own, bar, strict=True)]
            )
            print(
                f"{contender:36}{middle:8.2f}{ratio:12.2f}     ({low:.2f}–{high:.2f})"
            )
    print("\nthe bar: 1.1 × (the step alone + one read of the gradients)")


def make_contenders(model: str) -> list[Contender]:
    """Return an optimizer alone, one that clips, and one with torch's own clip."""

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def parameters() -> list[torch.nn.Parameter]:
        made = make_parameters(MODELS[model]())
        for parameter in made:
            parameter.grad = parameter.detach().clone()
        return made

    def attached(clipper: Any, owned: list[torch.nn.Parameter]) -> Any:
        step = optimizer(owned)
        clipper.attach(step)
        return step.step

    alone, torchs, fixed, quantile = (parameters() for _ in range(4))
    before = optimizer(torchs)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(torchs, 1.0)
        before.step()

    window = QuantileClip(quantile, scope="global", history_length=HISTORY)
    window.observe(torch.rand(HISTORY) + 0.5)
    return [
        Contender("fused AdamW", optimizer(alone).step),
        Contender("one read", reader(alone)),
        Contender("clip_grad_norm_, then fused AdamW", clip_and_step),
        Contender("NormClip attached", attached(NormClip(fixed, max_norm=1.0), fixed)),
        Contender("QuantileClip attached, global", attached(window, quantile)),
    ]


if __name__ == "__main__":
    main()
