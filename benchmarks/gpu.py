"""Time a clipper on a CUDA device: synchronisations, launches, bytes over bandwidth.

Run it as `python benchmarks/gpu.py`; `--help` lists the options. Each way to clip is
timed by the device's own clock, in turns, eager, compiled and as a captured graph, on
the shapes of GPT-2 (124M parameters) and of a decoder of 1.0B; a fused AdamW is timed
with its clip and with `TrustClip`. Without CUDA it says that nothing was measured, and
that is no error.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

import command
from autoclip_torch import AGC, Clipper, NormClip, QuantileClip, TrustClip
from autoclip_torch.kernels.choose import find_kernel
from contenders import HISTORY, Parameters
from models import Shape, set_gradients
from timing import Timed, alternate, clock, compare

CUDA = torch.device("cuda")
Step = Callable[[], Any]


class Way(NamedTuple):
    """One way to clip, and how often it has to pass over all gradients' bytes."""

    name: str
    step: Step
    passes: int
    without_kernel: int | None = None
    """The passes without the Triton kernel; None if they are the same."""

    @property
    def in_graph(self) -> int:
        """The passes of a compiled or captured step, which has no kernel of ours."""
        return self.passes if self.without_kernel is None else self.without_kernel


def decoder(
    width: int, layers: int, words: int = 50_257, places: int = 1024
) -> Iterator[Shape]:
    """Yield the shapes of GPT-2: 124M parameters at width 768 with 12 layers."""
    yield from [(words, width), (places, width)]
    for _ in range(layers):
        yield from [(width,)] * 4
        yield from [(3 * width, width), (3 * width,), (width, width), (width,)]
        yield from [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    yield from [(width,)] * 2


MODELS: dict[str, Callable[[], Iterator[Shape]]] = {
    "GPT-2, 124M": lambda: decoder(768, 12),
    "decoder, 1.0B": lambda: decoder(2048, 18),
}


def make_parameters(shapes: Iterator[Shape], device: torch.device) -> Parameters:
    """Return parameters of these shapes on a device, each with a gradient."""
    made = [torch.nn.Parameter(torch.randn(s, device=device) / 30) for s in shapes]
    for parameter in made:
        parameter.grad = torch.empty_like(parameter)
    set_gradients(made, 1.0)
    return made


def make_clippers(parameters: Parameters) -> dict[str, Clipper]:
    """Return clippers that clip nothing of these gradients, with full windows."""
    one = QuantileClip(parameters, history_length=HISTORY, scope="global")
    each = QuantileClip(parameters, history_length=HISTORY)
    for clipper in (one, each):
        norms = clipper.step().norm
        clipper.reset()
        clipper.observe((2 * norms).expand(HISTORY, -1))
    return {
        "NormClip": NormClip(parameters, max_norm=1e9),
        "QuantileClip, global": one,
        "QuantileClip, per parameter": each,
        "AGC, per unit": AGC(parameters, clipping=1e9),
    }


def make_ways(parameters: Parameters) -> list[Way]:
    """Return torch's fixed clip and the clippers.

    Each gradient is read for its norm. The Triton kernel reads and writes none, because
    none is clipped. Without it, two operations read and write each: one sets values to
    0, the other one scales. AGC reads the parameters, too, and copies both to float64.
    """
    ways = [Way("clip_grad_norm_", lambda: clip_grad_norm_(parameters, 1e9), 3)]
    passes = 5 if find_kernel(parameters[0].device) is None else 1
    for name, clipper in make_clippers(parameters).items():
        if name == "AGC, per unit":
            ways.append(Way(name, clipper.step, 14))
        else:
            ways.append(Way(name, clipper.step, passes, 5))
    return ways


def make_attached(parameters: Parameters) -> list[Way]:
    """Return a fused AdamW alone, after torch's clip, and with clippers attached."""

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-9, fused=True)

    # Here four optimizers step the same parameters; in a run that is a mistake.
    warnings.filterwarnings("ignore", ".*stepped parameters of a clipper")
    alone, after, attached, trusted = (adamw() for _ in range(4))
    NormClip(parameters, max_norm=1e9).attach(attached)
    TrustClip(None, trusted, history_length=HISTORY)

    def clip_and_step() -> None:
        clip_grad_norm_(parameters, 1e9)
        after.step()

    # A kernel that scales writes the gradients back.
    return [
        Way("fused AdamW", alone.step, 7),
        Way("clip_grad_norm_, then fused AdamW", clip_and_step, 10),
        Way("NormClip attached", attached.step, 9),
        # Also: weights copied 2, their norms 1, the change 4, the weights written 15.
        Way("TrustClip", trusted.step, 31),
    ]


def make_reader(parameters: Parameters) -> Way:
    """Return one read of as many bytes in one piece: what the bandwidth allows."""
    flat = torch.cat([parameter.detach().view(-1) for parameter in parameters])
    return Way("one read", lambda: torch.dot(flat, flat), 1)


def timed(step: Step, device: torch.device) -> Timed:
    """Return a step that is timed by the device's own clock."""
    for _ in range(3):
        step()
    if device.type != "cuda":
        return clock(step)

    def on_device() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end))

    return on_device


def captured(way: Way) -> Way:
    """Return the same step as a CUDA graph that is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            way.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way.step()
    return Way(f"{way.name}, graph", graph.replay, way.in_graph)


def compiled(way: Way) -> Way:
    """Return the same step in `torch.compile`."""
    return Way(f"{way.name}, compiled", torch.compile(way.step), way.in_graph)


def synchronises(step: Step) -> str:
    """Return "" if a step never waits for the device, else where it does."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def launches(step: Step) -> int:
    """Return how many kernels a step starts."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    # Only now does it know of any.
    on_device = (e for e in profiler.events() if e.device_type.name == "CUDA")
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def lines(
    ways: list[Way], device: torch.device, size: int, seconds: float
) -> list[dict[str, Any]]:
    """Return a line per way: its ratio to the first, and its share of the bandwidth."""
    steps = {way.name: timed(way.step, device) for way in ways}
    taken = alternate(steps, seconds)
    fastest_read = min(taken["one read"]) / size  # seconds a byte
    result = compare(taken, taken[ways[0].name])
    for line, way in zip(result, ways, strict=True):
        took = 1e-3 * line["milliseconds"]["median"]
        line["bytes"] = way.passes * size
        line["share"] = line["bytes"] * fastest_read / took
    return result


def measure(
    shapes: Iterator[Shape], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Measure one model: every way to clip, and a fused optimizer with its clip."""
    parameters = make_parameters(shapes, device)
    size = 4 * sum(parameter.numel() for parameter in parameters)
    eager, reader = make_ways(parameters), make_reader(parameters)
    ways = list(eager)
    result: dict[str, Any] = {"parameters": size // 4, "tensors": len(parameters)}
    if device.type == "cuda":
        result["synchronisations"] = {w.name: synchronises(w.step) for w in eager[1:]}
        result["kernels"] = {way.name: launches(way.step) for way in eager}
        for name in ("synchronisations", "kernels"):
            print(f"{name}: {result[name]}")
        ways += [make(way) for make in (compiled, captured) for way in eager]
    result["clip"] = lines([*ways, reader], device, size, seconds)
    del ways, eager
    steps = [*make_attached(parameters), reader]
    result["fused"] = lines(steps, device, size, seconds)
    return result


def main() -> None:
    """Measure each model, or tell that nothing was measured."""
    options = command.parse(command.parser(__doc__, seconds=10.0, per="table"))
    if not torch.cuda.is_available():
        print("there is no CUDA device: not measured")
        command.finish(options, "gpu", "torch", measured=False)
        return
    name, result = torch.cuda.get_device_name(), {}
    print(f"{name}, torch {torch.__version__}")
    for model, shapes in MODELS.items():
        print(model, flush=True)
        result[model] = measure(shapes(), CUDA, options.seconds)
        torch.cuda.empty_cache()
    results = {"measured": True, "device": name, "results": result}
    command.finish(options, "gpu", "torch", **results)


if __name__ == "__main__":
    main()
