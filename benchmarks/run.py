"""Time the clippers against torch.nn.utils.clip_grad_norm_ on the same gradients.

Run it as `python benchmarks/run.py`; `--help` tells the options.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import command

NEEDS = ["torch", "autoclip_torch"]
REGIMES = {"nothing clipped": 0.01, "all clipped": 100.0}
"""A gradient over its weight; the thresholds are at about 1."""


def main() -> int:
    """Run the benchmark and return the exit status."""
    options = read_options()
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        way_out = 'install with: pip install "autoclip-toolkit[torch]"'
        print(f"bench: missing {', '.join(missing)}; {way_out}", file=sys.stderr)
        return 2
    try:
        compare(options)
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        return 130
    return 0


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = command.parser(__doc__, seconds=10.0, per="model and regime")
    add = parser.add_argument
    add("--threads", type=int, default=2, help="of torch (default 2)")
    add("--picture", type=Path, metavar="FILE", help="draw the ratios there")
    return command.parse(parser)


def compare(options: argparse.Namespace) -> None:
    """Measure everything, print a table per model, save the numbers."""
    # Only here is it known that the packages are installed.
    import torch

    from contenders import REFERENCE, make_contenders
    from models import MODELS, make_parameters, set_gradients, tiny
    from peers import make_peers
    from report import LEGEND, Case, make_table, to_plain
    from timing import measure

    torch.set_num_threads(options.threads)
    models = {"tiny": tiny} if options.quick else MODELS
    print(LEGEND)
    cases = []
    for name, shapes in models.items():
        parameters = make_parameters(shapes())
        set_gradients(parameters, 1.0)
        peers, absent = make_peers(parameters)
        contenders = [*make_contenders(parameters), *peers]
        size = sum(parameter.numel() for parameter in parameters)
        own = []
        for regime, factor in REGIMES.items():
            results = measure(contenders, parameters, factor, options.seconds)
            own.append(Case(name, size, len(parameters), regime, results))
        print(f"\n{make_table(own, contenders)}", flush=True)
        if absent:
            print(f"not installed, so left out: {', '.join(absent)}")
        cases += own
    if options.picture:
        from picture import draw

        draw(options.picture, cases, [peer.name for peer in peers])
        print(f"\nThe picture is {options.picture}")
    found = {"reference": REFERENCE, "threads": options.threads}
    command.save(options.json, "torch", **found, results=to_plain(cases, contenders))


if __name__ == "__main__":
    sys.exit(main())
