"""Time a fused AdamW whose clipper is attached: the clip rides in its kernel.

Run it as `python benchmarks/fused.py`. The bar: the step alone, and one read of every
gradient on top.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

import command
from autoclip_torch import NormClip, QuantileClip
from contenders import HISTORY, Contender, reader
from models import MODELS, Shape, make_parameters, tiny
from timing import alternate, spread


def main() -> None:
    """Print a table per model."""
    options = command.parse(command.parser(__doc__, seconds=8.0))
    torch.set_num_threads(2)
    models = {name: MODELS[name] for name in ("lstm", "resnet50", "gpt")}
    found = []
    for name, shapes in ({"tiny": tiny} if options.quick else models).items():
        contenders = make_contenders(shapes)
        times = alternate(contenders, lambda contender: None, options.seconds)
        alone, read = times["fused AdamW"], times["one read"]
        bar = [1.1 * (a + r) for a, r in zip(alone, read, strict=True)]
        print(
            f"\n{name}, {len(alone)} rounds{'ms':>24}{'to the bar':>12}{'':5}quartiles"
        )
        for contender, own in times.items():
            middle = spread([1e3 * seconds for seconds in own]).median
            ratio = spread([mine / most for mine, most in zip(own, bar, strict=True)])
            quartiles = f"({ratio.low:.2f}–{ratio.high:.2f})"
            print(f"{contender:36}{middle:8.2f}{ratio.median:12.2f}     {quartiles}")
            case = {"model": name, "contender": contender, "milliseconds": middle}
            found.append(case | {"to_the_bar": ratio._asdict()})
    print("\nthe bar: 1.1 × (the step alone + one read of the gradients)")
    command.save(options.json, "torch", results=found)


def make_contenders(shapes: Callable[[], Iterator[Shape]]) -> list[Contender]:
    """Return an optimizer alone, one that clips, and one with torch's own clip."""

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def parameters() -> list[torch.nn.Parameter]:
        made = make_parameters(shapes())
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
