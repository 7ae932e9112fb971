"""`clipper.step()` inside `torch.compile(fullgraph=True)` and inside a CUDA graph."""

import shutil

import numpy as np
import pytest
import torch
from torch._dynamo import config
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from autoclip_core import (
    Cap,
    Drop,
    EmaRatio,
    Fixed,
    Quantile,
    StreamingQuantile,
    Warmup,
    decide,
)
from autoclip_torch import (
    AGC,
    AdaGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    ValueClip,
    ZClip,
)

CLIPPERS = {
    "quantile": lambda p: QuantileClip(p, quantile=0.5, history_length=20),
    "current": lambda p: QuantileClip(p, include_current=True, history_length=20),
    "global, scale only": lambda p: QuantileClip(
        p,
        quantile=0.5,
        scope="global",
        history_length=20,
        scale_only=lambda name, parameter: parameter.ndim > 1,
    ),
    "mean_std": lambda p: StandardClip(p, deviations=0.5, history_length=20),
    "zscore": lambda p: ZClip(p, z=0.5, warmup_steps=3),
    "ema_ratio": lambda p: AdaGC(p, warmup_steps=3, warmup_threshold=50.0),
    "agc": lambda p: AGC(p, clipping=0.5),
    "constant": lambda p: NormClip(p, max_norm=5.0),
    "value": lambda p: ValueClip(p, clip_value=0.5),
    "rms": lambda p: NormClip(p, max_norm=0.1, norm="rms", scope="group"),
    "max": lambda p: AGC(p, clipping=0.5, norm="max"),
    "combinators": lambda p: Clipper(
        p,
        Warmup(
            Cap(Drop(EmaRatio(3.0), clip=StreamingQuantile(0.5)), max_norm=9.0), steps=3
        ),
    ),
}


# Torch itself uses it to compile an optimizer, and in Inductor.
script_method = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def one_compilation():
    """Make a second compilation an error."""
    torch._dynamo.reset()
    counters.clear()
    with config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def model_and_clipper(make, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (3,), (2, 3)]
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
    ]
    return parameters, make(parameters)


def gradients(steps, seed=1):
    """Yield gradients whose norms spread over a factor of 100."""
    rng = np.random.default_rng(seed)
    for size in np.exp(rng.normal(size=steps) * 1.2):
        yield [
            torch.tensor(rng.normal(size=shape) * size, dtype=torch.float32)
            for shape in [(3, 4), (3,), (2, 3)]
        ]


def train(parameters, update, steps):
    """Return the decisions of all steps, one array per field."""
    decisions = []
    for grads in gradients(steps):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        decision = update()
        decisions.append([field.detach().numpy().copy() for field in decision])
    return [np.stack(field) for field in zip(*decisions, strict=True)]


def updater(parameters, clipper):
    """Return a training step without the backward pass."""

    @torch.no_grad()
    def update():
        decision = clipper.step()
        for parameter in parameters:
            parameter.sub_(parameter.grad, alpha=0.01)
        return decision

    return update


def compiled(function, backend="eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("name", CLIPPERS)
def test_a_compiled_step_decides_as_an_eager_one(name):
    eager, eager_clipper = model_and_clipper(CLIPPERS[name])
    traced, traced_clipper = model_and_clipper(CLIPPERS[name])
    expected = train(eager, updater(eager, eager_clipper), 30)
    decisions = train(traced, compiled(updater(traced, traced_clipper)), 30)
    assert expected[3].any()  # something was clipped
    assert expected[6].any() == (name == "combinators")  # and dropped
    for actual, wanted in zip(decisions, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=0)
    for actual, wanted in zip(traced, eager, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    assert traced_clipper.metrics() == pytest.approx(eager_clipper.metrics(), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_200_steps_are_one_compilation():
    parameters, clipper = model_and_clipper(
        lambda p: QuantileClip(p, quantile=0.9, history_length=50)
    )
    thresholds = train(parameters, compiled(updater(parameters, clipper)), 200)[1]
    assert counters["stats"]["unique_graphs"] == 1
    norms = np.array([[float(g.norm()) for g in grads] for grads in gradients(200)])
    expected = np.full_like(norms, np.inf)
    for step in range(1, 200):
        past = norms[max(0, step - 50) : step]
        expected[step] = np.quantile(past, 0.9, axis=0)
    np.testing.assert_allclose(thresholds, expected, rtol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
@script_method
@inductor.patch({"cpp.vec_isa_ok": False})
def test_inductor_compiles_a_step():
    """Vector instructions are off: g++ compiles their headers for ten seconds."""
    make = CLIPPERS["quantile"]
    parameters, clipper = model_and_clipper(make)
    decisions = train(
        parameters, compiled(updater(parameters, clipper), "inductor"), 12
    )
    policy, rows = Quantile(0.5, history_length=20), 3
    state, thresholds = policy.init(rows), []
    for grads in gradients(12):
        norms = np.array([np.linalg.norm(np.float64(g)) for g in grads])
        state, decision = decide(policy, state, norms)
        thresholds.append(decision.threshold)
    np.testing.assert_allclose(decisions[1], thresholds, rtol=1e-6)


@pytest.mark.skipif(
    not hasattr(config, "trace_autograd_ops"),
    reason="this torch cannot compile a backward pass in one graph",
)
def test_a_whole_training_step_is_one_graph():
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, 4, generator=rng) * 1.5**i for i in range(10)]

    def losses(wrap):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        clipper = QuantileClip(model.parameters(), quantile=0.5, scope="global")
        update = updater(list(model.parameters()), clipper)

        def step(x):
            loss = model(x).square().mean()
            loss.backward()
            update()
            return loss.detach()

        run, values = wrap(step), []
        for x in inputs:
            model.zero_grad()
            values.append(float(run(x)))
        return values

    with config.patch(trace_autograd_ops=True):
        actual = losses(compiled)
    assert actual == pytest.approx(losses(lambda step: step), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@script_method
def test_an_attached_clipper_is_compiled_with_the_optimizer():
    """Torch breaks the graph around every optimizer step, so `fullgraph` is off."""

    def run(wrap):
        parameters, clipper = model_and_clipper(CLIPPERS["quantile"])
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        clipper.attach(optimizer)
        step = wrap(optimizer.step)

        def update():
            step()
            return [torch.as_tensor(field) for field in clipper._policy_states.decision]

        return train(parameters, update, 10)[1], parameters

    thresholds, expected = run(lambda step: step)
    compiled_thresholds, parameters = run(torch.compile(backend="eager"))
    np.testing.assert_allclose(compiled_thresholds, thresholds, rtol=1e-5)
    for actual, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@script_method
@config.patch(error_on_recompile=False)
@pytest.mark.parametrize("policy", [Fixed(1.0), Drop(Fixed(1.0), action="skip")])
def test_a_compiled_fused_optimizer_is_clipped(policy):
    """Compiled code would not notice an attribute that a hook sets on the optimizer."""
    weights = []
    for wrap in (lambda step: step, torch.compile(backend="eager")):
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
        Clipper([weight], policy, scope="global").attach(optimizer)
        step = wrap(optimizer.step)
        for grad in ([3.0, 4.0], [0.3, 0.4], [30.0, 40.0]):
            weight.grad = torch.tensor(grad)
            step()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[1], weights[0])


def test_a_clipper_that_was_detached_compiles():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = NormClip([weight], max_norm=1.0)
    clipper.attach(optimizer).remove()
    weight.grad = torch.tensor([3.0, 4.0])
    compiled(lambda: clipper.step())()
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))


def test_a_gradient_within_its_limit_is_unchanged():
    parameters, clipper = model_and_clipper(lambda p: NormClip(p, max_norm=1e30))
    odd = [1e-45, 1e-40, -0.0]  # a multiplication by 1 may flush these
    parameters[1].grad = torch.tensor(odd)
    bits = parameters[1].grad.clone().view(torch.int32)
    compiled(clipper.step)()
    assert torch.equal(parameters[1].grad.view(torch.int32), bits)


def test_a_nonfinite_row_becomes_zero_and_is_not_recorded():
    parameters, clipper = model_and_clipper(lambda p: QuantileClip(p, history_length=9))
    step = compiled(clipper.step)
    for value in (1.0, float("nan"), float("inf"), 3.0):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
        decision = step()
        finite = value in (1.0, 3.0)
        assert all(bool(p.grad.isfinite().all()) for p in parameters)
        assert bool((parameters[0].grad == 0).all()) is not finite
    np.testing.assert_allclose(decision.threshold, np.sqrt([12.0, 3.0, 6.0]), 1e-6)
    assert clipper.metrics()["clip/nonfinite_total"] == 2


@config.patch(error_on_recompile=False)
def test_the_history_continues_between_eager_and_compiled_steps():
    """The history moves to where the decision is computed, which recompiles."""
    make = CLIPPERS["quantile"]
    eager, eager_clipper = model_and_clipper(make)
    mixed, mixed_clipper = model_and_clipper(make)
    expected = train(eager, updater(eager, eager_clipper), 30)
    plain = updater(mixed, mixed_clipper)
    steps = iter([plain] * 10 + [compiled(plain)] * 10 + [plain] * 10)
    decisions = train(mixed, lambda: next(steps)(), 30)
    for actual, wanted in zip(decisions, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5)


def test_the_state_stays_in_its_memory():
    """A CUDA graph writes to the addresses of its capture."""
    parameters, clipper = model_and_clipper(CLIPPERS["quantile"])
    step = compiled(updater(parameters, clipper))
    train(parameters, step, 3)

    def addresses():
        states = clipper._policy_states
        leaves = [*states.states[0], *states.tally]
        return [leaf.data_ptr() for leaf in leaves]

    before, saved = addresses(), clipper.state_dict()
    first = train(parameters, step, 5)
    clipper.load_state_dict(saved)
    again = train(parameters, step, 5)
    np.testing.assert_array_equal(again[1], first[1])
    clipper.reset()
    assert np.isinf(train(parameters, step, 5)[1][0]).all()
    assert addresses() == before


@pytest.mark.parametrize(
    "keywords", [{"nonfinite": "raise"}, {"nonfinite": "skip"}, {"on_clip": print}]
)
def test_modes_that_read_norms_refuse_to_be_compiled(keywords):
    parameters, clipper = model_and_clipper(lambda p: QuantileClip(p, **keywords))
    train(parameters, clipper.step, 1)  # an eager step works
    error = "on_clip and on_skip" if "on_clip" in keywords else "must read the norms"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=error):
        train(parameters, compiled(clipper.step), 1)


@pytest.mark.gpu
def test_a_captured_graph_replays_the_decisions():
    parameters, clipper = model_and_clipper(
        lambda p: QuantileClip(
            [torch.nn.Parameter(q.detach().cuda()) for q in p],
            quantile=0.5,
            history_length=20,
        )
    )
    parameters = [entry.parameter for entry in clipper._policy_states.rows.by_parameter]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        for _ in range(3):
            clipper.step()
    torch.cuda.synchronize()
    clipper.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decision = clipper.step()
    clipper.reset()
    expected = []
    policy = Quantile(0.5, history_length=20)
    state = policy.init(3)
    for grads in gradients(30):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad.copy_(grad)
        graph.replay()
        norms = np.array([np.linalg.norm(np.float64(g)) for g in grads])
        state, wanted = decide(policy, state, norms)
        expected.append(wanted.threshold)
        np.testing.assert_allclose(
            decision.threshold.cpu(), wanted.threshold, rtol=1e-6
        )
    assert np.isfinite(expected[-1]).all()
