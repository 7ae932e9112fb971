"""Draw how each policy reacts to a spike and to a change of level.

    python docs/draw_policies.py

writes docs/policies/*.png, which the pages of the policies show. It needs the extra
`plot`. The norms are made here, with a fixed seed.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from autoclip_core import (
    Cap,
    Drop,
    EmaRatio,
    Fixed,
    Floor,
    MeanStd,
    ParamRatio,
    Quantile,
    Replay,
    Scheduled,
    StreamingQuantile,
    Warmup,
    ZScore,
    decide,
    replay,
)
from autoclip_core.planning.plot import draw_comparison, draw_replay

PICTURES = Path(__file__).parent / "policies"
STEPS, SPIKE, SHIFT = 1000, 250, 500

DRAWN = {
    "fixed": Fixed(3.0),
    "scheduled": Scheduled([(0, 6.0), (400, 2.0)]),
    "quantile": Quantile(0.9, history_length=200),
    "streaming_quantile": StreamingQuantile(0.9),
    "mean_std": MeanStd(2.0, history_length=200),
    "zscore": ZScore(),
    "ema_ratio": EmaRatio(2.0),
}
INNER = Quantile(0.9, history_length=200)
AROUND = {
    "warmup": Warmup(INNER, steps=200, threshold=0.5),
    "cap": Cap(INNER, max_norm=3.0),
    "floor": Floor(INNER, min_norm=3.0),
}


def norms():
    """Return log-normal norms around 1, as healthy runs have them."""
    return np.exp(0.3 * np.random.default_rng(0).standard_normal(STEPS))


def a_spike_and_a_shift():
    """Return norms with one spike of 30, and four times as large from SHIFT on."""
    series = norms()
    series[SPIKE] = 30.0
    series[SHIFT:] *= 4.0
    return series


def replay_beside_weights(series, policy):
    """Return the replay of a policy that needs the norm of the weights: here 100."""
    weights, steps = np.full(1, 100.0), []
    state = policy.init(1)
    for norm in series.astype(np.float32):
        state, decision = decide(policy, state, [norm], param_norms=weights)
        steps.append(decision)
    taken = (np.concatenate(column) for column in zip(*steps, strict=True))
    return Replay(policy, *taken)


def save(figure, name, height):
    """Save a figure with few colours, so that it stays small."""
    figure.set_size_inches(8, height)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    path = PICTURES / f"{name}.png"
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def draw_all():
    """Draw a picture for each policy, and one for what stands around a policy."""
    series = a_spike_and_a_shift()
    for name, policy in DRAWN.items():
        save(draw_replay(replay(series, policy)), name, 4.6)
    agc = replay_beside_weights(series, ParamRatio(0.03))
    save(draw_replay(agc), "param_ratio", 4.6)
    dropped = draw_replay(replay(series, Drop(ZScore(4.0))))
    dropped.axes[0].set_title("Drop(ZScore(4.0))")  # the whole policy is too long
    save(dropped, "drop", 4.6)
    inside = {"Quantile": replay(series, INNER)}
    for name, policy in AROUND.items():
        both = inside | {name.title(): replay(series, policy)}
        save(draw_comparison(both), name, 4.6)


if __name__ == "__main__":
    draw_all()
