"""Two and four gloo processes against one: DDP, FSDP2, HSDP, tensor parallel, DTensor.

One process runs `support/torch_ranks.py`, which starts the ranks. Each test reads the
results of one case.
"""

import json
from functools import cache

import pytest
import torch

from ..support import torch_layouts
from ..support.run_module import run_module
from ..support.torch_rank_updates import PROGRAMS, UPDATE
from ..support.torch_ranks import WORLDS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of each rank: results[world][rank][case]."""
    folder = tmp_path_factory.mktemp("ranks")
    run_module("torch_ranks", folder, timeout=600)
    return {
        world: [
            json.loads((folder / f"{world}.{rank}.json").read_text())
            for rank in range(world)
        ]
        for world in WORLDS
    }


@cache
def in_one_process(case):
    return torch_layouts.run(case, torch_layouts.whole)


def of(results, world, case):
    """Return the ranks' results of a case, and fail if a rank failed."""
    of_ranks = [rank[case] for rank in results[world]]
    for result in of_ranks:
        assert "failed" not in result, result["failed"]
    return of_ranks


def assert_close(actual, expected, rtol=2e-5):
    torch.testing.assert_close(
        torch.tensor(actual).double(),
        torch.tensor(expected).double(),
        rtol=rtol,
        atol=1e-6,
        equal_nan=True,
    )


every_run = pytest.mark.parametrize(("world", "layout", "case"), torch_layouts.RUNS)
every_world = pytest.mark.parametrize("world", WORLDS)


@every_run
def test_many_ranks_clip_as_one_process_does(results, world, layout, case):
    ranks = of(results, world, f"{layout}: {case}")
    alone = in_one_process(case)
    for rank in ranks:
        assert rank["names"] == alone["names"]
        assert rank["decisions"] == ranks[0]["decisions"]  # bit for bit
    assert_close(ranks[0]["decisions"], alone["decisions"])
    assert_close(ranks[0]["norms"], alone["norms"])
    assert_close(ranks[0]["weights"], alone["weights"], rtol=1e-4)
    scales = torch.tensor([scale for _, _, scale in alone["decisions"]])
    assert bool((scales < 1).any()), "nothing was clipped"


@every_run
def test_a_step_takes_one_reduction(results, world, layout, case):
    counts = {
        tuple(rank["reductions"]) for rank in of(results, world, f"{layout}: {case}")
    }
    each = 0 if layout == "ddp" else 1
    assert counts == {(each,) * torch_layouts.STEPS}


@pytest.mark.parametrize(("world", "layout", "case"), torch_layouts.UPDATE_RUNS)
def test_many_ranks_clip_updates_as_one_process_does(results, world, layout, case):
    """The norms of the update and of the weights take one reduction together."""
    ranks = of(results, world, f"update, {layout}: {case}")
    alone = torch_layouts.run_updates(case, torch_layouts.whole)
    for rank in ranks:
        assert rank["rows"] == ranks[0]["rows"]  # bit for bit
        assert rank["reductions"] == [1] * torch_layouts.STEPS
    assert_close(ranks[0]["rows"], alone["rows"], rtol=1e-3)
    assert_close(ranks[0]["weights"], alone["weights"], rtol=1e-4)
    assert alone["rows"][-1][5] > 0, "the clip rate"


@every_world
def test_a_nan_in_one_shard_cancels_the_update_on_all_ranks(results, world):
    for rank in of(results, world, "skip_on_a_nan_of_one_rank"):
        assert rank == {"unchanged": True, "steps": [1], "skipped": 1.0}


def test_the_mean_loss_of_the_ranks_decides(results):
    for rank in of(results, 2, "losses_of_ranks"):
        for layout in rank["results"].values():
            assert layout == rank["wanted"]


def test_too_many_skips_stop_a_run_with_shards(results):
    for rank in of(results, 2, "too_many_skips_of_shards"):
        assert rank["step"] == 2
        assert "3 updates in a row were skipped" in rank["error"]


def test_too_many_skips_stop_a_fused_run_with_shards(results):
    for rank in of(results, 2, "too_many_skips_of_a_fused_optimizer"):
        assert rank["step"] == 2
        assert "3 updates in a row were skipped" in rank["error"]


@every_world
def test_an_overflow_on_one_rank_is_an_overflow_on_all_ranks(results, world):
    """The second of three steps overflows on rank 0; rank 1 has no gradient at all."""
    ranks = of(results, world, "an_overflow_on_one_rank")
    for number, rank in enumerate(ranks):
        first, second, third = rank["weights"]
        assert first == second  # momentum and weight decay, too
        assert (second != third) == (number != 1)
        assert rank["scales"] == [4.0, 2.0, 2.0]
        assert rank["metrics"] == ranks[0]["metrics"]
    assert ranks[0]["metrics"]["clip/nonfinite_total"] == 0
    assert ranks[0]["metrics"]["clip/clip_rate"] == 1.0


def test_a_loss_scale_over_shards_is_the_same_on_all_ranks(results):
    ranks = of(results, 2, "a_scaler_of_shards")
    for rank in ranks:
        for way in rank["ways"]:
            first, second, third = way["weights"]
            assert first == second != third
            assert way["scale"] == 2.0
            assert way["metrics"]["clip/nonfinite_total"] == 0
            assert_close(way["weights"], rank["ways"][0]["weights"], rtol=1e-4)
            for name in ("clip/norm", "clip/threshold", "clip/clip_rate"):
                expected = ranks[0]["ways"][0]["metrics"][name]
                assert_close(way["metrics"][name], expected, rtol=1e-4)


def test_a_scaler_around_attached_stages_is_refused_on_all_ranks(results):
    for rank in of(results, 2, "a_scaler_around_attached_stages"):
        assert len(rank["errors"]) == 3
        for error in rank["errors"]:
            assert "clipper.step(scaler=scaler, optimizer=optimizer)" in error
        assert rank["left"] == []


def test_attached_stages_share_one_norm(results):
    for rank in of(results, 2, "attached_stages"):
        assert_close(rank["weight"], -1 / 2**0.5)


def test_a_copy_of_a_clipper_reduces_over_the_same_ranks(results):
    for rank in of(results, 2, "a_copy_of_a_clipper_of_stages"):
        assert_close(rank["norm"], 3 * 2**0.5)


def test_a_clipper_made_before_sharding_follows_its_model_or_warns(results):
    for rank in of(results, 2, "made_before_sharding"):
        model, parameters, part = rank["warnings"]
        assert model == part == []
        (text,) = parameters
        assert "has not received a gradient" in text
        assert "fully_shard" in text
        of_model, wanted, *_, of_part, wanted_of_part = rank["norms"]
        assert min(wanted, wanted_of_part) > 0
        assert (of_model, of_part) == (wanted, wanted_of_part)


@every_world
def test_experts_and_shards_count_once(results, world):
    for rank in of(results, world, "experts_beside_shards"):
        for norm, wanted, scaled_back, gradient in rank["found"]:
            assert_close(norm, wanted)
            assert_close(scaled_back, gradient)


@every_world
def test_sharded_stages_share_one_norm(results, world):
    for rank in of(results, world, "sharded_stages"):
        assert_close(rank["norm"], rank["wanted"])


def test_a_process_group_across_shards_is_refused(results):
    for rank in of(results, 4, "a_process_group_across_shards"):
        assert "process_group must be within the ranks" in rank["error"]


def test_frozen_parameters_are_handled_as_in_one_process(results):
    for rank in of(results, 2, "frozen_on_all_ranks"):
        for sharded, alone in zip(rank["sharded"], rank["alone"], strict=True):
            assert_close(sharded, alone)


@every_world
def test_stages_on_one_grid_are_not_taken_for_copies(results, world):
    for rank in of(results, world, "stages_with_two_meshes_each"):
        wanted = [2.0, 2.0] if rank["stage"] == 0 else [20.0, 20.0]
        assert_close(rank["norms"], wanted)


def test_the_flat_parameters_of_fsdp1_are_refused(results):
    """OpenDiloco#6: also those of a clipper that was made before."""
    for rank in of(results, 2, "flat_parameters_of_fsdp1"):
        assert len(rank) == 4
        for use, error in rank.items():
            assert error is not None, use
            assert "FSDP1" in error
            assert "threshold()" in error


def test_an_infinity_in_one_shard_raises_on_all_ranks(results):
    errors = {r["error"] for r in of(results, 2, "raise_on_a_nan_of_one_rank")}
    assert len(errors) == 1
    assert "is not finite" in errors.pop()


@every_world
def test_a_rank_without_gradients_enters_the_reduction(results, world):
    ranks = of(results, world, "a_rank_without_gradients")
    norms = torch.tensor([rank["local norms"] for rank in ranks], dtype=torch.float64)
    for rank in ranks:
        assert_close(rank["norms"], norms.norm(dim=0).tolist())
        assert rank["state"] == ranks[0]["state"]


@every_world
def test_the_stages_of_a_pipeline_share_one_norm(results, world):
    ranks = of(results, world, "stages_of_a_pipeline")
    squares = torch.tensor([rank["squares"] for rank in ranks], dtype=torch.float64)
    for rank in ranks:
        assert_close(rank["norms"], squares.sum(0).sqrt().tolist())
    after = torch.tensor([rank["after"] for rank in ranks]).sum(0)
    assert_close(after.tolist(), [1.0] * 3)


@every_world
def test_with_scale_only_a_stage_may_scale_all_and_another_none(results, world):
    ranks = [rank["first"] for rank in of(results, world, "stages_of_a_pipeline")]
    first, *others = (rank["size"] for rank in ranks)
    norm = (first + sum(others)) ** 0.5
    for number, rank in enumerate(ranks):
        assert_close(rank["norm"], norm)
        assert_close(rank["gradient"], [1.0 if number else 1 / norm] * 2)
        assert_close(rank["norm after"], (first / norm**2 + sum(others)) ** 0.5)


def test_a_norm_that_is_a_dtensor_can_be_observed(results):
    alone = in_one_process("global")["decisions"][0][0]
    for rank in of(results, 2, "observe_a_sharded_norm"):
        assert rank["kind"] == "DTensor"
        assert_close(rank["norm"], alone)


def test_a_checkpoint_of_four_ranks_resumes_on_two(results):
    saved = of(results, 4, "save_half_way")[0]
    for rank in of(results, 2, "load_half_way"):
        assert_close(rank["decisions"], saved["decisions"])
        assert_close(rank["weights"], saved["weights"], rtol=1e-4)


@every_world
def test_stages_with_different_rows_are_refused_on_every_rank(results, world):
    for number, rank in enumerate(of(results, world, "stages_with_other_rows")):
        words = f"got {2 + 2 * number} on this rank and 2 to {2 * world} on all"
        assert words in rank["error"]
        assert rank["grad"] == 1.0


def test_removing_one_of_two_clippers_leaves_the_other_its_mark(results):
    for rank in of(results, 2, "two_clippers_of_stages"):
        assert rank["marked"] == [["_step_supports_amp_scaling"]] * 2
        assert rank["left"] == []


def test_unfinished_sums_have_the_norm_of_the_sum(results):
    for rank in of(results, 2, "sequence_parallel"):
        assert len(rank["found"]) == 24
        for whole, parts in zip(rank["found"][::2], rank["found"][1::2], strict=True):
            assert all("Partial" in kind for kind in parts["kinds"])
            assert max(whole["values"]) > 20.0
            assert_close(parts["values"], whole["values"])


@every_world
def test_copies_shards_and_experts_are_in_one_norm(results, world):
    """Dense parameters count once: 6.782 on two ranks, and not 7.616."""
    for rank in of(results, world, "replicas_and_experts"):
        for norm, wanted, scaled_back, gradients in rank["found"]:
            assert_close(norm, wanted)
            assert_close(scaled_back, gradients)
    if world == 2:
        assert_close(rank["found"][0][0], 46**0.5)
    for rank in of(results, world, "replicas_shards_and_experts"):
        assert_close(rank["norm"], rank["wanted"])


def test_copies_that_are_counted_wrongly_are_refused_on_all_ranks(results):
    words = {
        "undeclared": "got 'None, but dense has the same gradient on all ranks'; name",
        "unnamed": "got 'None, but parameter 0 has the same gradient on all ranks'",
        "not copies": "same gradient on all ranks, got {'expert': [3.0, 5.0]}",
        "on one rank": "the same parameters on all ranks of process_group, got ['dense",
    }
    for rank in of(results, 2, "misused_replicas"):
        for case, message in words.items():
            assert message in rank[case]
        assert rank["declared as none"] == []
        assert "leave process_group out" in rank["all are copies"][0]


def test_ranks_change_their_parameters_together_or_name_the_one_that_did(results):
    for rank in of(results, 2, "a_change_of_parameters"):
        found = rank["found"]
        for kind in ("shards", "stages"):
            error, rows = found[f"{kind}, all"]
            assert (error, rows) == (None, 1)
            error, _ = found[f"{kind}, alone"]
            assert "rank 1 is in change of parameters after 1 steps" in error


@every_world
def test_every_rank_names_the_one_that_left_out_a_step(results, world):
    """The others are in a step while it is in the check, or in threshold()."""
    last = world - 1
    for rank in of(results, world, "a_left_out_step"):
        assert len(rank["errors"]) == 10
        for message in rank["errors"].values():
            assert f"rank {last} is in check_agreement after 2 steps" in message
            assert "the others are in step after 2 steps of the clipper;" in message
        assert f"rank {last} is in threshold" in rank["threshold"]


@every_world
def test_left_out_steps_that_balance_are_noticed(results, world):
    """The optimizer of the first rank is one step further than its clipper."""
    for rank in of(results, world, "left_out_steps_that_balance"):
        assert len(rank["errors"]) == 5
        for message in rank["errors"].values():
            assert "rank 0 is in step after 1 steps of the clipper and 2" in message
            assert "; call clipper.step() on every rank" in message


@every_world
def test_every_rank_names_the_one_that_left_out_an_update(results, world):
    """Of two ranks in the same call, it is the one that is behind."""
    for rank in of(results, world, "a_left_out_update"):
        assert len(rank["errors"]) == 5
        for message in rank["errors"].values():
            assert "step of the optimizer, but rank 0 is in step after 5" in message
            assert "clipper and 4 of the optimizer, while the others are" in message
            assert "; call optimizer.step() after clipper.step()" in message


def test_ranks_in_the_same_step_pass(results):
    for rank in of(results, 2, "steps_that_agree"):
        assert rank["steps"] == 4


def test_both_halves_of_a_trust_clip_are_compared(results):
    for rank in of(results, 2, "steps_of_a_trust_clip"):
        assert rank["agree"] is None
        assert "rank 1 is in check_agreement after 1 steps" in rank["left out"]


def test_ranks_communicate_on_the_device_of_their_mesh(results):
    """With CPU offload the shards are on the CPU, and the mesh is not."""
    for rank in of(results, 2, "devices_of_collectives"):
        assert (rank["mesh"], rank["no mesh"]) == ("cpu", "cpu")
        assert (rank["offloaded"], rank["on the mesh"]) == ("cuda", "cuda:1")
        assert rank["no backend"] in ("cpu", "cuda")


def test_gradients_that_are_summed_after_the_clip_warn_once(results):
    for rank in of(results, 2, "gradients_after_the_clip"):
        warned = {name: len(texts) for name, texts in rank["found"].items()}
        right = {"average": 0, "sum before": 0, "clip again": 0, "noise": 0}
        assert warned == {"sum": 1, **right}
        for text in rank["found"]["sum"]:
            assert "gradients grew between clipper.step() and optimizer" in text


def assert_names_the_last_rank(result, world):
    """The others are in their clip, and no rank has changed a weight."""
    last = f"rank {world - 1} is in {UPDATE} after 2 steps"
    assert last in result["error"]
    assert "the others are in step after 2 steps" in result["error"]
    assert result["unchanged"]


@every_world
def test_every_rank_names_the_one_that_updates_without_a_clip(results, world):
    """Under `fully_shard` they waited for each other until a timeout."""
    for rank in of(results, world, "a_left_out_clip"):
        assert len(rank["found"]) > 10
        for result in rank["found"].values():
            assert_names_the_last_rank(result, world)
        if world == 4:
            assert {"hsdp", "a flat mesh and a grid"} <= set(rank["found"])
    if world == 4:
        for result in of(results, 4, "a_left_out_clip_of_sharded_stages"):
            assert_names_the_last_rank(result, 4)


@pytest.mark.parametrize("program", PROGRAMS)
def test_right_programs_pass_with_few_further_reductions(results, program):
    for rank in of(results, 2, "right_programs"):
        result = rank["found"][program.__name__]
        assert result["error"] is None
        checked = [reason for reason in result["reasons"] if reason == UPDATE]
        assert len(checked) == PROGRAMS[program]
        # A check has the reductions of a step: on a device, no rank stops in its first.
        losses = [reason for reason in result["reasons"] if reason == "loss"]
        assert len(losses) == (4 + 3 if program.__name__ == "losses" else 0)


def test_no_rank_checks_updates_that_some_cannot_count(results):
    for rank in of(results, 4, "a_stage_with_two_optimizers"):
        assert rank == {"steps": 4.0}


def test_a_timeout_says_that_a_rank_left_out_a_step(results):
    of_first, of_second = of(results, 2, "a_rank_that_does_not_step")
    (note,) = of_first["notes"]
    assert "after 1 steps of the clipper: it has left out a step, or" in note
    assert of_second["notes"] == []
