"""One clipping setting for five losses: AutoClip's Table 1 in miniature.

Two synthetic voices are to be separated by a small bidirectional LSTM under Adam, with
five losses whose gradients differ in size by orders of magnitude. The claims are those
of Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for
source separation networks" (2020): clipping at a low percentile helps every loss, one
setting serves all, and the norm goes with the smoothness of the loss more closely.

`python examples/experiments/speech_losses.py` takes about 7 minutes on two cores.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoclip_core import Fixed, Quantile
from autoclip_torch import Clipper
from experiment import read_options, run_all, save
from score import improvement
from separation import LOSSES, Batch, Separator
from speech_picture import draw
from speech_tables import correlation_table, gain_table, norm_table, score_table
from voices import Mixtures, make_mixtures

SAMPLES = 2000
"""Half a second."""

BATCH, RATE = 8, 1e-3


class Size(NamedTuple):
    """How much is done: steps of a run, mixtures to train and to test with."""

    steps: int
    training: int
    test: int


FULL, TRIAL = Size(500, 400, 100), Size(4, 16, 4)

METHODS: dict[str, Any] = {
    "no clipping": None,
    "quantile 0.9": Quantile(0.9),
    "quantile 0.5": Quantile(0.5),
    "quantile 0.1": Quantile(0.1),
    "fixed 1": Fixed(1.0),
    "fixed 0.01": Fixed(0.01),
    "fixed 0.0001": Fixed(1e-4),
}
"""The paper's percentile p is the quantile p / 100."""

TRACED = "MI"
"""The loss of the run that is drawn, as in the paper."""

DRAWN = ("no clipping", "quantile 0.1")
"""The methods whose first seed is drawn."""


@cache
def training_mixtures(count: int) -> Mixtures:
    """Return what all runs of this process train with."""
    return make_mixtures(0, count, SAMPLES)


@cache
def test_batch(count: int) -> Batch:
    """Return other voices, for the score."""
    return Batch.of(make_mixtures(1, count, SAMPLES))


def train(loss: str, method: str, seed: int, size: Size, trace: bool) -> dict[str, Any]:
    """Return the score in dB, the clip rate and the median norm; perhaps a trace."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, policy = Separator(), METHODS[method]
    adam = torch.optim.Adam(model.parameters(), lr=RATE)
    clipper = Clipper(model, policy or Fixed(1.0), scope="global", dry_run=not policy)
    mixtures, norms, clipped, traced = training_mixtures(size.training), [], [], []
    for _ in range(size.steps):
        chosen = torch.randint(size.training, (BATCH,))
        batch = Batch.of(Mixtures(*(waves[chosen] for waves in mixtures)))
        value, gradient = differentiate(model, loss, batch)
        before = flat(model.parameters())
        decision = clipper.step()
        adam.step()
        norms.append(decision.norm.item())
        clipped.append(decision.clipped.item())
        if trace:
            step = flat(model.parameters()) - before
            _, after = differentiate(model, loss, batch)
            smoothness = (after - gradient).norm() / step.norm()
            threshold = decision.threshold.item() if policy else np.inf
            traced.append([value, norms[-1], threshold, step.norm(), smoothness])
    return {
        "score": improvement(model, loss, test_batch(size.test)),
        "clip_rate": float(np.mean(clipped)) if policy else 0.0,
        "median_norm": float(np.median(norms)),
        "trace": np.array(traced, float).T,
    }


def differentiate(model: Separator, loss: str, batch: Batch) -> tuple[float, Tensor]:
    """Return the loss and its gradient, which is in `.grad` as well."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # heads that a loss does not use
    value = LOSSES[loss](*model(batch.mixed_spectra), batch)
    value.backward()
    return value.item(), flat(p.grad for p in model.parameters())


def flat(tensors: Any) -> Tensor:
    """Return one long vector, a copy."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def main(arguments: list[str] | None = None) -> None:
    """Run the grid, print the tables, save picture and results."""
    options = read_options(__doc__, arguments)
    seeds, size = (1, TRIAL) if options.quick else (3, FULL)
    cells = [
        (loss, method, seed, size, loss == TRACED)
        for loss in LOSSES
        for method in METHODS
        for seed in range(seeds)
    ]
    found = run_all(train, cells, options.workers)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (loss, method, *_), run in zip(cells, found, strict=True):
        runs.setdefault((loss, method), []).append(run)
    tables = {
        "Gain in signal-to-distortion ratio, dB": score_table(runs),
        "Against no clipping with the same seed, dB": gain_table(runs),
        "Norms and clipped steps": norm_table(runs),
        f"{TRACED}: log norm and log smoothness": correlation_table(runs, TRACED),
    }
    results = [
        {"loss": loss, "method": method}
        | {
            name: [round(run[name], 6) for run in of_cell]
            for name in ("score", "clip_rate", "median_norm")
        }
        for (loss, method), of_cell in runs.items()
    ]
    traces = {name: runs[TRACED, name][0]["trace"] for name in DRAWN}
    draw(traces, options.output / "speech_losses.png")
    save("speech_losses", options.output, tables, results)


if __name__ == "__main__":
    main()
