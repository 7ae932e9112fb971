"""What a log costs: time per record, share of a training step, memory at 10^7 steps.

Run it from the repository: `python benchmarks/log_cost.py`. The step with logging reads
the clipper's metrics once in 50 steps.
"""

import statistics
import time
import tracemalloc

import numpy as np

import command
from autoclip_core import ClipLog, Fixed, MetricsLogger, decide

LONG = 10**7


def per_record(steps, **given):
    """Microseconds for one record, the best of five."""
    best = float("inf")
    for _ in range(5):
        log = ClipLog()
        start = time.perf_counter()
        for _ in range(steps):
            log.record(**given)
        best = min(best, (time.perf_counter() - start) / steps)
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
    used, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(log) == steps
    return used / 1e6, most / 1e6


def training_steps(log, steps):
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
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(data).square().mean().backward()
        clipper.step()
        optimizer.step()
        if send:
            send(clipper.metrics)
        times.append(1e3 * (time.perf_counter() - start))
    return times[steps // 5 :]


def main():
    options = command.parse(command.parser(__doc__))
    metrics = {"clip/norm": 3.0, "clip/threshold": 2.0, "clip/scale": 0.66}
    metrics |= {"clip/clipped": 1.0, "clip/nonfinite_total": 0, "clip/steps": 7}
    kinds = {
        "plain numbers": {"norm": 3.0, "threshold": 2.0},
        "a dict of metrics": {"decision": metrics},
        "a decision, 1 row": {"decision": decision_of(1)},
        "a decision, 100 rows": {"decision": decision_of(100)},
    }
    count = 100 if options.quick else 10_000
    records = {name: per_record(count, **given) for name, given in kinds.items()}
    print("microseconds per record")
    for name, cost in records.items():
        print(f"  {name:22}{cost:6.2f}")
    long = 10 * count if options.quick else LONG
    sizes = {steps: memory(steps) for steps in (long // 100, long)}
    for steps, (used, most) in sizes.items():
        print(f"memory at {steps:8} steps: {used:.1f} MB, at most {most:.1f} MB")
    # Taken in turns, because the machine is never the same twice.
    without, with_log = [], []
    for _ in range(1 if options.quick else 3):
        without += training_steps(None, 5 * count // 100)
        with_log += training_steps(ClipLog(), 5 * count // 100)
    a, b = statistics.median(without), statistics.median(with_log)
    print(f"a training step: {a:.3f} ms; logged every 50 steps: {b:.3f} ms")
    steps = {"without": a, "logged": b}
    command.finish(
        options,
        "log_cost",
        "torch",
        microseconds_per_record=records,
        megabytes_held_and_at_most=sizes,
        milliseconds_per_step=steps,
    )


if __name__ == "__main__":
    main()
