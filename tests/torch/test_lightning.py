"""`ClipCallback` in a real Lightning Trainer, and clippers under Lightning Fabric."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch")

from lightning import fabric  # noqa: E402
from lightning.fabric.plugins.environments import (  # noqa: E402
    TorchElasticEnvironment,
)
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import (  # noqa: E402
    DDPStrategy,
    ModelParallelStrategy,
)
from torch.distributed.fsdp import fully_shard  # noqa: E402

from autoclip_core import Fixed, ParamRatio, read_norms  # noqa: E402
from autoclip_torch import (  # noqa: E402
    NormClip,
    QuantileClip,
    TrustClip,
    UpdateClipper,
)
from autoclip_torch.lightning import ClipCallback  # noqa: E402

from ..support.lightning_modules import (  # noqa: E402
    QUANTILE,
    TRUST,
    WARNINGS,
    Automatic,
    Fused,
    Manual,
    OneBackward,
    TwoOptimizers,
    batches,
    trainer,
)

pytestmark = WARNINGS

quantile_and_trust = pytest.mark.parametrize(
    ("kind", "settings"), [(QuantileClip, QUANTILE), (TrustClip, TRUST)]
)


def plain_loop(epochs=1):
    """Train without Lightning, and call the clipper by hand."""
    module = Automatic()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    clipper = QuantileClip(module, **QUANTILE)
    for _ in range(epochs):
        for batch in batches():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            clipper.step()
            optimizer.step()
    return module, clipper


def assert_like_the_plain_loop(module, callback, epochs=1, rtol=1e-5):
    expected, clipper = plain_loop(epochs)
    (ours,) = callback.clippers
    for name in ("clip/steps", "clip/clip_rate"):
        assert ours.metrics()[name] == clipper.metrics()[name]
    assert clipper.metrics()["clip/clip_rate"] > 0.5
    torch.testing.assert_close(
        module.net.weight, expected.net.weight, rtol=rtol, atol=rtol
    )


@pytest.mark.parametrize("kind", [Automatic, Manual, Fused])
def test_a_trainer_clips_as_a_plain_loop_does(tmp_path, kind):
    module, calls = kind(), []
    functions = {"on_clip": lambda decision, names, step: calls.append(step)}
    callback = ClipCallback(QuantileClip, **QUANTILE, **functions)
    trainer(tmp_path, callback).fit(module)
    assert_like_the_plain_loop(module, callback)
    [clipper] = callback.clippers
    assert clipper.names == ["global"]
    metrics = clipper.metrics()
    assert len(calls) == round(metrics["clip/clip_rate"] * metrics["clip/steps"])


@pytest.mark.parametrize("kind", [Automatic, Manual, Fused])
def test_unscaled_gradients_are_clipped(tmp_path, kind):
    """16-bit precision with a scaler: the first step overflows and is not recorded."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    module, callback = kind(), ClipCallback(QuantileClip, **QUANTILE)
    trainer(tmp_path, callback, epochs=4, plugins=[plugin]).fit(module)
    metrics = callback.clippers[0].metrics()
    assert scaler.get_scale() < 2.0**17
    assert metrics["clip/nonfinite_total"] == 0
    ring = callback.clippers[0].state_dict()["states"][0]["ring"]
    # l1_loss: the norm of a batch is at most that of its mean input.
    assert ring.min() > 0
    assert ring.max() < 3**5 * 10
    assert bool(module.net.weight.isfinite().all())


class ClipsByHand(Manual):
    """Clips before the trainer has unscaled the gradients."""

    def configure_optimizers(self):
        self.clipper = NormClip(self.net, 1.0)
        return super().configure_optimizers()

    def manual_backward(self, loss):
        super().manual_backward(loss)
        self.clipper.step()


def test_a_clip_of_scaled_gradients_leads_to_what_works_in_a_trainer(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    advice = r"as Lightning does, call clipper.attach\(optimizer\) or use its ClipCall"
    with pytest.warns(UserWarning, match=advice):
        trainer(tmp_path, plugins=[plugin]).fit(ClipsByHand())


def test_bfloat16(tmp_path):
    module, callback = Automatic(), ClipCallback(QuantileClip, **QUANTILE)
    trainer(tmp_path, callback, precision="bf16-mixed").fit(module)
    assert_like_the_plain_loop(module, callback, rtol=0.05)


def test_accumulated_gradients_are_one_step(tmp_path):
    module, callback = Automatic(), ClipCallback(QuantileClip, **QUANTILE)
    trainer(tmp_path, callback, accumulate_grad_batches=3).fit(module)
    assert callback.clippers[0].metrics()["clip/steps"] == 2


def test_two_optimizers_have_a_history_each(tmp_path):
    module, callback = TwoOptimizers(), ClipCallback(QuantileClip, **QUANTILE)
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, callback, logger=logger).fit(module)
    first, second = callback.clippers
    assert first.metrics()["clip/steps"] == second.metrics()["clip/steps"] == 6
    expected, _ = plain_loop()
    torch.testing.assert_close(module.net.weight, expected.net.weight)
    logged = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0]
    for index in range(2):
        assert f"clip/optimizer{index}/norm" in logged


@quantile_and_trust
def test_the_metrics_are_logged(tmp_path, kind, settings):
    logger = CSVLogger(tmp_path)
    callback = ClipCallback(kind, **settings)
    trainer(tmp_path, callback, logger=logger).fit(Automatic())
    header, *rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert len(rows) == 6
    last = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    for name, value in callback.clippers[0].metrics().items():
        assert float(last[name]) == pytest.approx(value, rel=1e-6)
    assert 0 < float(last["clip/clip_rate"]) < 1
    if kind is TrustClip:
        assert 0 < float(last["clip/update_clip_rate"]) <= 1
    for folder in (tmp_path, logger.log_dir):
        read = read_norms(folder)
        assert (read.kind, read.column, read.empty) == ("CSV", "clip/norm", 0)
        assert read.norms.tolist() == pytest.approx(
            [
                float(row.split(",")[header.split(",").index("clip/norm")])
                for row in rows
            ]
        )
        assert read.steps.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (QuantileClip, QUANTILE),
        (TrustClip, TRUST),
        (partial(UpdateClipper, policy=ParamRatio(0.02)), {"scope": "global"}),
    ],
)
def test_a_resumed_run_has_the_history(tmp_path, kind, settings):
    whole, through = Automatic(), ClipCallback(kind, **settings)
    trainer(tmp_path, through, epochs=2).fit(whole)

    first = ClipCallback(kind, **settings)
    half = trainer(tmp_path, first, epochs=1, enable_checkpointing=True)
    half.fit(Automatic())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, second = Automatic(), ClipCallback(kind, **settings)
    again = trainer(tmp_path, second, epochs=2)
    again.fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    torch.testing.assert_close(resumed.net.weight, whole.net.weight, rtol=0, atol=0)
    metrics = second.clippers[0].metrics()
    assert metrics == through.clippers[0].metrics()
    assert metrics.get("clip/steps", metrics.get("clip/update_steps")) == 12


def saved_half_way(folder, **settings):
    """Train one epoch with these settings; return the checkpoint."""
    callback = ClipCallback(QuantileClip, **settings)
    half = trainer(folder, callback, epochs=1, enable_checkpointing=True)
    half.fit(Automatic())
    half.save_checkpoint(folder / "half.ckpt")
    return folder / "half.ckpt"


def test_another_quantile_on_resume_applies_and_is_said(tmp_path):
    path = saved_half_way(tmp_path, **QUANTILE)
    other = ClipCallback(QuantileClip, **(QUANTILE | {"quantile": 0.6}))
    resumed = trainer(tmp_path, other, epochs=2)
    with pytest.warns(UserWarning, match=r"quantile is .* and 0\.6 in .*; to keep"):
        resumed.fit(Automatic(), ckpt_path=path, weights_only=True)
    (clipper,) = other.clippers
    assert clipper.metrics()["clip/steps"] == resumed.global_step
    assert clipper.policy.quantile == 0.6


def test_a_history_of_another_length_on_resume_is_refused(tmp_path):
    path = saved_half_way(tmp_path, **QUANTILE)
    other = ClipCallback(QuantileClip, **(QUANTILE | {"history_length": 7}))
    with pytest.raises(ValueError, match="7"):
        trainer(tmp_path, other, epochs=2).fit(
            Automatic(), ckpt_path=path, weights_only=True
        )


def test_a_function_among_the_settings_does_not_lose_the_history(tmp_path):
    def settings():  # a new function each time, as in a new process
        return QUANTILE | {"exclude": lambda name, parameter: "bias" in name}

    path = saved_half_way(tmp_path, **settings())
    second = ClipCallback(QuantileClip, **settings())
    resumed = trainer(tmp_path, second, epochs=2)
    resumed.fit(Automatic(), ckpt_path=path, weights_only=True)
    assert second.clippers[0].metrics()["clip/steps"] == resumed.global_step


def test_two_callbacks_in_one_checkpoint():
    keys = {
        ClipCallback(kind, scope=scope, optimizer=number, **more).state_key
        for scope in ("global", "parameter")
        for number in (None, 0, 1)
        for kind, more in (
            (QuantileClip, {}),
            (NormClip, {"max_norm": 1.0}),
            (NormClip, {"max_norm": 1.0, "scale_only": "*bias"}),
        )
    }
    assert len(keys) == 18


def test_a_checkpoint_without_a_history_warns(tmp_path):
    path = saved_half_way(tmp_path, **QUANTILE)
    other = ClipCallback(NormClip, max_norm=1.0)
    with pytest.warns(UserWarning, match="half.ckpt has no history for ClipCallback"):
        trainer(tmp_path, other, epochs=2).fit(
            Automatic(), ckpt_path=path, weights_only=True
        )


def test_each_optimizer_may_have_its_own_clipper(tmp_path):
    first = ClipCallback(QuantileClip, optimizer=0, **QUANTILE)
    second = ClipCallback(NormClip, optimizer=1, max_norm=1e-3)
    logger, module = CSVLogger(tmp_path), TwoOptimizers()
    trainer(tmp_path, first, second, logger=logger).fit(module)
    expected, _ = plain_loop()
    torch.testing.assert_close(module.net.weight, expected.net.weight)
    assert module.other.weight.grad.norm() <= 1.001e-3
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0]
    assert "clip/optimizer0/norm" in header
    assert "clip/optimizer1/norm" in header


def test_exclude_may_name_what_another_optimizer_steps(tmp_path):
    module = TwoOptimizers()
    callback = ClipCallback(NormClip, max_norm=1e-3, exclude=["other.bias"])
    trainer(tmp_path, callback).fit(module)
    assert module.other.weight.grad.norm() <= 1.001e-3
    assert module.other.bias.grad.norm() > 1e-3
    assert module.net.bias.grad.norm() <= 1.001e-3


def test_a_function_that_makes_no_clipper_of_groups_is_refused(tmp_path):
    callback = ClipCallback(lambda model: TrustClip(model))
    with pytest.raises(TypeError, match=r"'optimizer'; write ClipCallback\(TrustClip"):
        trainer(tmp_path, callback).fit(Automatic())


def clipper_of_weights(groups):
    first = groups[0].parameters[0]
    return NormClip([(first.name, first.parameter)], max_norm=1.0)


def test_a_function_that_makes_a_clipper_of_a_part_warns(tmp_path):
    callback = ClipCallback(clipper_of_weights)
    with pytest.warns(UserWarning, match="Adam steps 2 tensors, .* clips 1 of them"):
        trainer(tmp_path, callback).fit(Automatic())


def test_an_optimizer_number_out_of_range_is_refused(tmp_path):
    callback = ClipCallback(QuantileClip, optimizer=2)
    with pytest.raises(ValueError, match=r"one of the 2 .* counted from 0, got 2"):
        trainer(tmp_path, callback).fit(TwoOptimizers())


class NoOptimizer(Automatic):
    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
def test_a_module_that_returns_no_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"return the .* or .*attach\(optimizer\)"):
        trainer(tmp_path, ClipCallback(QuantileClip)).fit(NoOptimizer())


class OnlyFirst(TwoOptimizers):
    def configure_optimizers(self):
        return super().configure_optimizers()[:1]


def test_another_number_of_optimizers_on_resume_is_refused(tmp_path):
    both = trainer(tmp_path, ClipCallback(QuantileClip, **QUANTILE))
    both.fit(TwoOptimizers())
    both.save_checkpoint(tmp_path / "both.ckpt")
    one = trainer(tmp_path, ClipCallback(QuantileClip, **QUANTILE), epochs=2)
    with pytest.raises(ValueError, match=r"one history per optimizer .* got 2 for 1"):
        one.fit(OnlyFirst(), ckpt_path=tmp_path / "both.ckpt", weights_only=True)


def test_after_training_the_optimizer_is_free(tmp_path):
    module, callback = Automatic(), ClipCallback(NormClip, max_norm=1e-3)
    run = trainer(tmp_path, callback)
    run.fit(module)
    assert not run.optimizers[0]._optimizer_step_pre_hooks
    run.fit_loop.max_epochs = 2
    run.fit(module)
    assert callback.clippers[0].metrics()["clip/steps"] == 6


def test_a_second_clipper_warns(tmp_path):
    callback = ClipCallback(QuantileClip, **QUANTILE)
    with (
        pytest.warns(UserWarning, match="norms of 1 again and again"),
        pytest.warns(UserWarning, match="gradient_clip_val=1.0. clips before"),
    ):
        trainer(tmp_path, callback, epochs=3, gradient_clip_val=1.0).fit(Automatic())


class ClipsBySelf(Automatic):
    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        self.clip_gradients(optimizer, 1e-3, "norm")


def test_a_module_that_clips_by_itself_warns(tmp_path):
    callback = ClipCallback(QuantileClip, **QUANTILE)
    with (
        pytest.warns(UserWarning, match=r"norms of 0\.001 again and again"),
        pytest.warns(UserWarning, match=r"ClipsBySelf.configure_.* clips before"),
    ):
        trainer(tmp_path, callback, epochs=3).fit(ClipsBySelf())
    assert callback.clippers[0].metrics()["clip/norm"] <= 1.001e-3


class Interrupted(Automatic):
    """Keeps its optimizer, and fails once during an epoch."""

    failed = False

    def training_step(self, batch, index):
        if index == 2 and not self.failed:
            self.failed = True
            raise ArithmeticError
        return super().training_step(batch, index)

    def configure_optimizers(self):
        if not hasattr(self, "kept"):
            self.kept = super().configure_optimizers()
        return self.kept


def test_a_run_that_failed_leaves_the_optimizer_free(tmp_path):
    module, callback = Interrupted(), ClipCallback(QuantileClip, **QUANTILE)
    run = trainer(tmp_path, callback)
    with pytest.raises(ArithmeticError):
        run.fit(module)
    assert not module.kept._optimizer_step_pre_hooks
    assert callback.clippers[0].metrics()["clip/steps"] == 2


# Tests of other processes: one child imports Lightning, resumes a run, and forks two
# ranks.


@pytest.fixture(scope="module")
def child_results(tmp_path_factory):
    """The folder in which the child continues `half.ckpt` and the ranks leave files."""
    folder = tmp_path_factory.mktemp("lightning")
    half = trainer(folder, ClipCallback(QuantileClip, **QUANTILE), epochs=1)
    half.fit(TwoOptimizers())
    half.save_checkpoint(folder / "half.ckpt")
    code = f"import sys; from {__name__} import run_child; run_child(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def run_child(folder):
    torch.set_num_threads(1)
    start = torch.multiprocessing.start_processes
    start(rank_of_two, args=(folder,), nprocs=2, start_method="fork")
    resume(folder)


@pytest.mark.slow
def test_a_run_resumed_in_another_process_has_the_same_bits(tmp_path, child_results):
    whole, through = TwoOptimizers(), ClipCallback(QuantileClip, **QUANTILE)
    trainer(tmp_path, through, epochs=2).fit(whole)
    weights, states = torch.load(child_results / "resumed.pt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weights[name], weight)
    for resumed, clipper in zip(states, through.clippers, strict=True):
        expected = clipper.state_dict()
        assert torch.equal(resumed["states"][0]["ring"], expected["states"][0]["ring"])
        assert torch.equal(resumed["tally"]["clipped"], expected["tally"]["clipped"])


def resume(folder):
    module, callback = TwoOptimizers(), ClipCallback(QuantileClip, **QUANTILE)
    path = f"{folder}/half.ckpt"
    run = trainer(folder, callback, epochs=2)
    run.fit(module, ckpt_path=path, weights_only=True)
    states = [clipper.state_dict() for clipper in callback.clippers]
    torch.save([module.state_dict(), states], f"{folder}/resumed.pt")


@pytest.mark.slow
def test_two_processes(child_results):
    """Both ranks get the same batches, so both must equal the plain loop."""
    expected, clipper = plain_loop()
    ring = clipper.state_dict()["states"][0]["ring"]
    for strategy in ("ddp", "fsdp2"):
        for rank in range(2):
            weight, state = torch.load(child_results / f"{strategy}{rank}.pt")
            torch.testing.assert_close(weight, expected.net.weight.data)
            torch.testing.assert_close(state["states"][0]["ring"], ring)


class Sharded(Automatic):
    """The first rank holds the only row of the weight; the other shard is empty."""

    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def rank_of_two(rank, folder):
    """Train as one of two ranks, as if `torchrun` had started it."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    # The ranks connect through a file: a free port may be taken a moment later.
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=2
    )
    gloo = {"process_group_backend": "gloo"}
    for name, module, strategy in (
        ("ddp", Automatic(), DDPStrategy(**gloo)),
        ("fsdp2", Sharded(), ModelParallelStrategy(**gloo)),
    ):
        callback = ClipCallback(QuantileClip, **QUANTILE)
        settings = {"strategy": strategy, "use_distributed_sampler": False}
        settings["plugins"] = [TorchElasticEnvironment()]
        run = trainer(folder, callback, devices=2, **settings)
        run.fit(module)
        weight = module.net.weight.data
        full = weight.full_tensor() if name == "fsdp2" else weight
        result = [full, callback.clippers[0].state_dict()]
        torch.save(result, f"{folder}/{name}{run.global_rank}.pt")
    torch.distributed.destroy_process_group()


class Losses(pl.Callback):
    """The last loss of a clipper after each batch, and the loss of each batch."""

    def __init__(self, callback):
        self.callback = callback
        self.steps, self.decided, self.computed = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        metrics = self.callback.clippers[0].metrics()
        if metrics["clip/steps"] > len(self.decided):
            self.decided.append(metrics["clip/loss"])
            self.steps.append(index)

    def on_train_batch_start(self, trainer, pl_module, batch, index):
        with torch.no_grad():
            x, y = batch
            loss = torch.nn.functional.l1_loss(pl_module.net(x), y)
        self.computed.append(loss.item())


SCALER = torch.amp.GradScaler("cpu", init_scale=4.0)
LOSS_CASES = {
    "automatic": (Automatic, {}),
    "fused": (Fused, {}),
    "accumulated": (Automatic, {"accumulate_grad_batches": 4}),
    "manual": (Manual, {}),
    "scaled": (Automatic, {"plugins": [MixedPrecision("16-mixed", "cpu", SCALER)]}),
    "one of two": (TwoOptimizers, {}),
}


@pytest.mark.parametrize("kind", LOSS_CASES)
def test_a_loss_policy_receives_the_mean_loss_of_the_step(tmp_path, kind):
    """An accumulated step has four batches, and the last one of an epoch two."""
    module, settings = LOSS_CASES[kind]
    index = 0 if kind == "one of two" else None
    callback = ClipCallback(
        NormClip, max_norm=1.0, loss_policy=Fixed(1.5), optimizer=index
    )
    losses = Losses(callback)
    trainer(tmp_path, losses, callback, **settings).fit(module())
    ends = [step + 1 for step in losses.steps]
    assert ends == ([4, 6] if kind == "accumulated" else [1, 2, 3, 4, 5, 6])
    starts = [0, *ends[:-1]]
    means = [
        sum(losses.computed[start:end]) / (end - start)
        for start, end in zip(starts, ends, strict=True)
    ]
    rtol = 1e-2 if kind == "scaled" else 1e-5
    assert losses.decided == pytest.approx(means, rel=rtol)
    skipped = sum(mean > 1.5 for mean in means)
    assert callback.clippers[0].metrics()["clip/skipped_total"] == skipped > 0


def test_the_steps_after_one_backward_pass_use_the_same_loss(tmp_path):
    callback = ClipCallback(NormClip, max_norm=1.0, loss_policy=Fixed(1e6))
    trainer(tmp_path, callback).fit(OneBackward())
    first, second = (clipper.metrics() for clipper in callback.clippers)
    assert first["clip/loss"] == second["clip/loss"]
    assert first["clip/skipped_total"] == second["clip/skipped_total"] == 0


# Fabric: its wrappers, its precision, its checkpoints.


FABRIC_LIMIT = 1e-3


def step_of_fabric(launched, model, optimizer, clipper, by_hand):
    """Take one step of SGD with learning rate 1; return the length of the update."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    launched.backward(model(torch.full((4, 3), 100.0)).sum())
    if by_hand:
        clipper.step()
    optimizer.step()
    moved = [
        (p - old).flatten() for p, old in zip(model.parameters(), before, strict=True)
    ]
    return torch.cat(moved).norm().item()


@pytest.mark.parametrize("how", ["by hand", "attached", "fused"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(tmp_path, how, precision):
    launched = fabric.Fabric(accelerator="cpu", precision=precision)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=how == "fused")
    model, optimizer = launched.setup(model, optimizer)
    clipper = NormClip(model, max_norm=FABRIC_LIMIT)
    if how != "by hand":
        clipper.attach(optimizer)
    moved = step_of_fabric(launched, model, optimizer, clipper, how == "by hand")
    assert moved == pytest.approx(FABRIC_LIMIT, rel=1e-3)
    state = {"model": model, "optimizer": optimizer, "clipper": clipper}
    launched.save(tmp_path / "state.ckpt", state)
    clipper.reset()
    launched.load(tmp_path / "state.ckpt", state)
    assert clipper.metrics()["clip/steps"] == 1
