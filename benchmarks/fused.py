"""Time a fused AdamW whose clipper is attached: its kernel scales the gradients.

Run it as `python benchmarks/fused.py`. The unit is 1.1 times the sum of the step alone
and one read of every gradient. AdamW alone passes seven times over as many numbers as
there are parameters. With a scale, its kernel writes the gradients, too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

import command
from autoclip_torch import NormClip, QuantileClip
from contenders import HISTORY, THREADS, Parameters, reader
from models import MODELS, Shape, make_parameters, tiny
from timing import Timed, alternate, clock, compare

ALONE, READ = "fused AdamW", "one read, tensor by tensor"
UNIT = "1.1 × (step + read)"


def main() -> None:
    """Compare on each model, with a unit that is measured in the same rounds."""
    options = command.parse(command.parser(__doc__, seconds=6.0))
    torch.set_num_threads(THREADS)
    models = {name: MODELS[name] for name in ("LSTM", "ResNet-50", "GPT")}
    results = []
    for name, shapes in ({"tiny": tiny} if options.quick else models).items():
        taken = alternate(make_contenders(shapes), options.seconds)
        pairs = zip(taken[ALONE], taken[READ], strict=True)
        unit = [1.1 * (alone + read) for alone, read in pairs]
        results += compare({UNIT: unit} | taken, unit, model=name)
    command.finish(options, "fused", "torch", threads=THREADS, results=results)


def make_contenders(shapes: Callable[[], Iterator[Shape]]) -> dict[str, Timed]:
    """Return an optimizer alone, one that clips, and one with torch's own clip."""

    def optimizer(parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def parameters() -> Parameters:
        made = make_parameters(shapes())
        for parameter in made:
            parameter.grad = parameter.detach().clone()
        return made

    def attached(clipper: Any, owned: Parameters) -> Any:
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
    steps = {
        ALONE: optimizer(alone).step,
        READ: reader(alone),
        "clip_grad_norm_, then fused AdamW": clip_and_step,
        "NormClip, attached": attached(NormClip(fixed, max_norm=1.0), fixed),
        "QuantileClip, global, attached": attached(window, quantile),
    }
    return {name: clock(step) for name, step in steps.items()}


if __name__ == "__main__":
    main()
