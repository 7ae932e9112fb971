"""Time a clipper on a CUDA device: synchronisations, launches, bytes over bandwidth.

Run it as `python benchmarks/gpu.py`; `--help` lists the options. Each way to clip is
timed by the device's own clock, in turns, in float32, bfloat16 and float16, with
nothing clipped and with all clipped, on the shapes of GPT-2 (124M parameters) and of a
decoder of 1.0B. If nothing is clipped, it is also timed compiled and as a captured
graph. Fused and foreach AdamW are timed with their clip and with `TrustClip`. Without
CUDA the script measures nothing, which is no error; `--device cpu --quick` tries it.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

import command
from autoclip_torch import AGC, Clipper, NormClip, QuantileClip, TrustClip
from autoclip_torch.kernels.choose import find_kernel
from contenders import HISTORY, Parameters
from models import Shape, set_gradients
from regimes import ALL, NOTHING, REGIMES
from timing import Timed, alternate, clock, compare

TYPES = torch.float32, torch.bfloat16, torch.float16
OF_ADAMW = {"fused": 7, "foreach": 21}
"""How often a step of AdamW passes over as many bytes as the gradients have."""
RATES = {NOTHING: 1e-9, ALL: 0.1}
"""Learning rates, within the bound of `TrustClip` and beyond it."""
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


def make_parameters(
    shapes: Iterator[Shape], device: torch.device, dtype: torch.dtype
) -> Parameters:
    """Return parameters of these shapes on a device, each with an equal gradient."""
    new = {"device": device, "dtype": dtype}
    made = [torch.nn.Parameter(torch.randn(shape, **new) / 30) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.empty_like(parameter)
    set_gradients(made, 1.0)
    return made


def make_clippers(parameters: Parameters, regime: str) -> dict[str, Clipper]:
    """Return clippers whose thresholds are the norms of these gradients.

    A window is longer than all rounds, so its smallest or largest norm stays.
    """
    window = {"quantile": float(regime == NOTHING), "history_length": 2 * HISTORY}
    one = QuantileClip(parameters, scope="global", **window)
    each = QuantileClip(parameters, **window)
    for clipper in (one, each):
        norms = clipper.step().norm
        clipper.reset()
        clipper.observe(norms.expand(1, -1))
    return {
        "NormClip": NormClip(parameters, max_norm=float(get_total_norm(parameters))),
        "QuantileClip, global": one,
        "QuantileClip, per parameter": each,
        "AGC, per unit": AGC(parameters, clipping=1.0),
    }


def count_passes(parameters: Parameters, regime: str) -> int:
    """Return how often a clipper passes over the gradients.

    Each gradient is read for its norm. The Triton kernel reads and writes only those
    that are clipped. Without it, two operations read and write each: one sets values to
    0, the other one scales.
    """
    if find_kernel(parameters[0].device) is None:
        return 5
    return 1 if regime == NOTHING else 3


def make_ways(parameters: Parameters, regime: str) -> list[Way]:
    """Return torch's fixed clip and the clippers.

    AGC reads the parameters, too, and copies both to float64. The kernel does not scale
    its units.
    """
    passes = count_passes(parameters, regime)
    of_agc = 6 + 32 // parameters[0].dtype.itemsize
    clippers = make_clippers(parameters, regime)
    max_norm = float(get_total_norm(parameters))
    ways = [Way("clip_grad_norm_", lambda: clip_grad_norm_(parameters, max_norm), 3)]
    for name, clipper in clippers.items():
        if name == "AGC, per unit":
            ways.append(Way(name, clipper.step, of_agc))
        else:
            ways.append(Way(name, clipper.step, passes, 5))
    return ways


def make_attached(parameters: Parameters, regime: str, kind: str) -> list[Way]:
    """Return an AdamW alone, after torch's clip, and with clippers attached.

    A fused kernel that scales writes the gradients back. `TrustClip` copies the weights
    (2 passes), measures them (1), subtracts and measures the change (4), and writes the
    weights (15). It widens half precision.
    """
    # Here several optimizers step the same parameters; in a run that is a mistake.
    warnings.filterwarnings("ignore", ".*stepped parameters of a clipper")
    alone, after, attached, trusted = (
        torch.optim.AdamW(parameters, lr=RATES[regime], eps=1e-6, **{kind: True})
        for _ in range(4)
    )
    max_norm = float(get_total_norm(parameters))
    NormClip(parameters, max_norm=max_norm).attach(attached)
    TrustClip(None, trusted, history_length=HISTORY)

    def clip_and_step() -> None:
        clip_grad_norm_(parameters, max_norm)
        after.step()

    passes = OF_ADAMW[kind]
    clipped = passes + (2 if kind == "fused" else count_passes(parameters, regime))
    bound = 22 if parameters[0].dtype.itemsize == 4 else 51
    return [
        Way(f"AdamW, {kind}", alone.step, passes),
        Way("clip_grad_norm_, then AdamW", clip_and_step, passes + 3),
        Way("NormClip, attached", attached.step, clipped),
        Way("TrustClip", trusted.step, clipped + bound),
    ]


def make_reader(parameters: Parameters) -> Way:
    """Return one read of as many bytes in one piece: what the bandwidth allows."""
    flat = torch.cat([parameter.detach().view(-1) for parameter in parameters])
    return Way("one read", lambda: torch.dot(flat, flat), 1)


def timed(step: Step, restore: Step, device: torch.device) -> Timed:
    """Return a step that is timed by the device's own clock, after what restores."""
    for _ in range(3):
        restore()
        step()
    if device.type != "cuda":
        return clock(step, restore)

    def on_device() -> float:
        restore()
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
    ways: list[Way], parameters: Parameters, regime: str, seconds: float
) -> list[dict[str, Any]]:
    """Return a line per way: its ratio to the first, and its share of the bandwidth."""

    def restore() -> None:
        set_gradients(parameters, REGIMES[regime])

    device, ways = parameters[0].device, [*ways, make_reader(parameters)]
    size = sum(parameter.nbytes for parameter in parameters)
    steps = {way.name: timed(way.step, restore, device) for way in ways}
    taken = alternate(steps, seconds)
    fastest_read = min(taken["one read"]) / size  # seconds a byte
    result = compare(taken, taken[ways[0].name], regime=regime)
    for line, way in zip(result, ways, strict=True):
        took = 1e-3 * line["milliseconds"]["median"]
        line["bytes"] = way.passes * size
        line["share"] = line["bytes"] * fastest_read / took
    return result


def measure(parameters: Parameters, regime: str, seconds: float) -> dict[str, Any]:
    """Measure every way to clip, and each AdamW with its clip."""
    result: dict[str, Any] = {}
    ways = make_ways(parameters, regime)
    if parameters[0].is_cuda:
        result["synchronisations"] = {w.name: synchronises(w.step) for w in ways[1:]}
        result["kernels"] = {way.name: launches(way.step) for way in ways}
        for name in ("synchronisations", "kernels"):
            print(f"{name}: {result[name]}")
        if regime == NOTHING:  # in a graph, all clipped takes the same time
            ways += [make(way) for make in (compiled, captured) for way in ways]
    result["clip"] = lines(ways, parameters, regime, seconds)
    del ways
    for kind in OF_ADAMW:
        attached = make_attached(parameters, regime, kind)
        result[kind] = lines(attached, parameters, regime, seconds)
    return result


def measure_types(
    shapes: Callable[[], Iterator[Shape]],
    types: Sequence[torch.dtype],
    device: torch.device,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """Measure one model in each type, with nothing clipped and with all clipped."""
    results: dict[str, dict[str, Any]] = {}
    for dtype in types:
        name = str(dtype).removeprefix("torch.")
        results[name] = {}
        for regime in REGIMES:
            print(f"{name}, {regime}", flush=True)
            parameters = make_parameters(shapes(), device, dtype)
            results[name][regime] = measure(parameters, regime, seconds)
    return results


def main() -> None:
    """Measure each model, or tell that nothing was measured."""
    parser = command.parser(__doc__, seconds=5.0, per="table")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = command.parse(parser)
    is_cuda = options.device == "cuda"
    if is_cuda and not torch.cuda.is_available():
        print("there is no CUDA device: not measured")
        command.finish(options, "gpu", "torch", measured=False)
        return
    name, result = torch.cuda.get_device_name() if is_cuda else "CPU", {}
    print(f"{name}, torch {torch.__version__}")
    models, types = MODELS, TYPES
    if options.quick:
        models, types = {"tiny": lambda: decoder(16, 2, 50, 8)}, TYPES[:2]
    for model, shapes in models.items():
        print(model, flush=True)
        result[model] = measure_types(
            shapes, types, torch.device(options.device), options.seconds
        )
        if is_cuda:
            torch.cuda.empty_cache()
    results = {"measured": True, "device": name, "results": result}
    command.finish(options, "gpu", "torch", **results)


if __name__ == "__main__":
    main()
