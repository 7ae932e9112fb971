"""Time the clippers against torch.nn.utils.clip_grad_norm_ on the same gradients.

Run it as `python benchmarks/run.py`; `--help` lists the options.
"""

from typing import Any

import torch

import command
from checked import measure
from contenders import REFERENCE, SAME, THREADS, Parameters, make_contenders
from models import MODELS, make_parameters, set_gradients, tiny
from peers import make_peers
from regimes import REGIMES
from timing import compare


def main() -> None:
    """Compare on each model, nothing clipped and all clipped."""
    parser = command.parser(__doc__, seconds=8.0, per="model and regime")
    options = command.parse(parser)
    torch.set_num_threads(THREADS)
    sizes, results = {}, []
    for name, shapes in ({"tiny": tiny} if options.quick else MODELS).items():
        parameters = make_parameters(shapes())
        sizes[name] = sum(parameter.numel() for parameter in parameters)
        results += compare_all(name, parameters, options.seconds)
    numbers = {"reference": REFERENCE, "parameters": sizes, "results": results}
    command.finish(options, "run", "torch", threads=THREADS, **numbers)


def compare_all(
    model: str, parameters: Parameters, seconds: float
) -> list[dict[str, Any]]:
    """Return a line for each regime and contender; `kind` says whose it is."""
    set_gradients(parameters, 1.0)
    ours, (peers, absent) = make_contenders(parameters), make_peers(parameters)
    about: dict[str, dict[str, Any]] = {}
    for kind, contenders in {"ours": ours, "theirs": peers}.items():
        about |= {c.name: {"kind": kind, "rows": c.rows} for c in contenders}
    for name in (REFERENCE, SAME):
        about[name]["kind"] = "reference"
    lines = []
    for regime, factor in REGIMES.items():
        taken = measure([*ours, *peers], parameters, factor, seconds)
        lines += compare(taken, taken[REFERENCE], model=model, regime=regime)
        print(f"{model}, {regime}: {lines[-1]['rounds']} rounds", flush=True)
    if absent:
        print(f"not installed, so left out: {', '.join(absent)}")
    return [line | about[line["contender"]] for line in lines]


if __name__ == "__main__":
    main()
