"""What a log costs: time per record, share of a training step, memory at 10^7 steps.

Run it from the repository: `python benchmarks/log_cost.py`. The step with logging reads
the clipper's metrics once in 50 steps.
"""

import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from autoclip_core import ClipLog, Fixed, MetricsLogger, decide

STEPS = 10_000
LONG = 10**7


def per_record(**given):
    """Microseconds for one record, the best of five."""
    best = float("inf")
    for _ in range(5):
        log = ClipLog()
        start = time.perf_counter()
        for _ in range(STEPS):
            log.record(**given)
        best = min(best, (time.perf_counter() - start) / STEPS)
    return 1e6 * best


def decision_of(rows):
    policy = Fixed(1.0)
    norms = np.linspace(0.5, 2.0, rows, dtype=np.float32)
    return decide(policy, policy.init(rows), norms)[1]


def memory(steps):
    """Megabytes that a log of so many steps holds, and held at most."""
    log = ClipLog()
    tracemalloc.start()
    for _ in range(steps):
        log.record(norm=1.0, threshold=2.0)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(log) == steps
    return held / 1e6, most / 1e6


def training_steps(log):
    """Milliseconds of each step of a small model, logged or not."""
    import torch

    from autoclip_torch import QuantileClip

    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 256) for _ in range(8)]
    model = torch.nn.Sequential(*layers)
    clipper = QuantileClip(model.named_parameters(), quantile=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = torch.randn(64, 256)
    send = MetricsLogger(log, every=50) if log is not None else None
    times = []
    for _ in range(500):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(data).square().mean().backward()
        clipper.step()
        optimizer.step()
        if send:
            send(clipper.metrics)
        times.append(1e3 * (time.perf_counter() - start))
    return times[100:]


def main():
    metrics = {"clip/norm": 3.0, "clip/threshold": 2.0, "clip/scale": 0.66}
    metrics |= {"clip/clipped": 1.0, "clip/nonfinite_total": 0, "clip/steps": 7}
    print("microseconds per record")
    print(f"  plain numbers        {per_record(norm=3.0, threshold=2.0):6.2f}")
    print(f"  a dict of metrics    {per_record(decision=metrics):6.2f}")
    for rows in (1, 100):
        cost = per_record(decision=decision_of(rows))
        print(f"  a decision, {rows:3} rows {cost:6.2f}")
    for steps in (LONG // 100, LONG):
        held, most = memory(steps)
        print(f"memory at {steps:8} steps: {held:.1f} MB, at most {most:.1f} MB")
    # Taken in turns, because the machine is never the same twice.
    without, with_log = [], []
    for _ in range(3):
        without += training_steps(None)
        with_log += training_steps(ClipLog())
    a, b = statistics.median(without), statistics.median(with_log)
    print(f"a training step: {a:.3f} ms; logged every 50 steps: {b:.3f} ms")


if __name__ == "__main__":
    main()
