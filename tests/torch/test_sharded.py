"""Two and four gloo processes against one: DDP, FSDP2, HSDP, tensor parallel, DTensor.

The processes run `torch_ranks.py` once per number of ranks; each test reads one case.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from ..support import torch_ranks

RANKS = (4, 2)  # the two load what the four have saved


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank of each world found: results[world][rank][case]."""
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    script = Path(torch_ranks.__file__)
    for world in RANKS:
        done = subprocess.run(
            [sys.executable, str(script), str(world), str(folder)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        files = [folder / f"{world}.{rank}.json" for rank in range(world)]
        found[world] = [json.loads(file.read_text()) for file in files]
    return found


@cache
def in_one_process(case):
    return torch_ranks.run(case, torch_ranks.whole)


def of(results, world, case):
    """Return the ranks' results, which must have come about."""
    found = [rank[case] for rank in results[world]]
    for result in found:
        assert "failed" not in result, result["failed"]
    return found


def close(ours, theirs, rtol=2e-5):
    torch.testing.assert_close(
        torch.tensor(ours).double(),
        torch.tensor(theirs).double(),
        rtol=rtol,
        atol=1e-6,
        equal_nan=True,
    )


CASES = [
    (world, layout, case)
    for layout, (_, worlds) in torch_ranks.LAYOUTS.items()
    for world in worlds
    for case in torch_ranks.CLIPPERS
]


@pytest.mark.parametrize(("world", "layout", "case"), CASES)
def test_many_ranks_clip_as_one_process_does(results, world, layout, case):
    ranks = of(results, world, f"{layout}: {case}")
    alone = in_one_process(case)
    for rank in ranks:
        assert rank["names"] == alone["names"]
        assert rank["decisions"] == ranks[0]["decisions"]  # to the bit
    close(ranks[0]["decisions"], alone["decisions"])
    close(ranks[0]["weights"], alone["weights"], rtol=1e-4)
    scales = torch.tensor([scale for _, _, scale in alone["decisions"]])
    assert bool((scales < 1).any()), "nothing was clipped"


@pytest.mark.parametrize(("world", "layout", "case"), CASES)
def test_a_step_takes_one_reduction(results, world, layout, case):
    counts = {
        tuple(rank["reductions"]) for rank in of(results, world, f"{layout}: {case}")
    }
    each = 0 if layout == "ddp" else 1
    assert counts == {(each,) * torch_ranks.STEPS}


@pytest.mark.parametrize("world", RANKS)
def test_a_nan_in_one_shard_cancels_the_update_of_all(results, world):
    for rank in of(results, world, "skip_on_a_nan_of_one_rank"):
        assert rank == {"unchanged": True, "steps": [1], "skipped": 1.0}


@pytest.mark.parametrize("world", RANKS)
def test_too_many_skips_stop_a_run_with_shards(results, world):
    for rank in of(results, world, "too_many_skips_of_shards"):
        assert rank["step"] == 2
        assert "3 updates in a row were skipped" in rank["error"]


@pytest.mark.parametrize("world", RANKS)
def test_too_many_skips_stop_a_fused_run_with_shards(results, world):
    for rank in of(results, world, "too_many_skips_of_a_fused_optimizer"):
        assert rank["step"] == 2
        assert "3 updates in a row were skipped" in rank["error"]


@pytest.mark.parametrize("world", RANKS)
def test_an_overflow_on_one_rank_is_one_on_all(results, world):
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


@pytest.mark.parametrize("world", RANKS)
def test_a_loss_scale_over_shards_is_one_on_all_ranks(results, world):
    ranks = of(results, world, "a_scaler_of_shards")
    for rank in ranks:
        for way in rank["ways"]:
            first, second, third = way["weights"]
            assert first == second != third
            assert way["scale"] == 2.0
            assert way["metrics"]["clip/nonfinite_total"] == 0
            close(way["weights"], rank["ways"][0]["weights"], rtol=1e-4)
            for name in ("clip/norm", "clip/threshold", "clip/clip_rate"):
                theirs = ranks[0]["ways"][0]["metrics"][name]
                close(way["metrics"][name], theirs, rtol=1e-4)


@pytest.mark.parametrize("world", RANKS)
def test_a_scaler_around_attached_stages_is_refused_on_all_ranks(results, world):
    for rank in of(results, world, "a_scaler_around_attached_stages"):
        assert len(rank["errors"]) == 3
        for error in rank["errors"]:
            assert "clipper.step(scaler=scaler, optimizer=optimizer)" in error
        assert rank["left"] == []


@pytest.mark.parametrize("world", RANKS)
def test_attached_stages_share_one_norm(results, world):
    for rank in of(results, world, "attached_stages"):
        close(rank["weight"], -1 / world**0.5)


@pytest.mark.parametrize("world", RANKS)
def test_a_copy_of_a_clipper_adds_up_with_the_same_ranks(results, world):
    for rank in of(results, world, "a_copy_of_a_clipper_of_stages"):
        close(rank["norm"], 3 * world**0.5)


@pytest.mark.parametrize("world", RANKS)
def test_a_clipper_made_before_sharding_is_told_so(results, world):
    for rank in of(results, world, "made_before_sharding"):
        model, parameters, part = rank["warnings"]
        assert len(model) == len(parameters) == len(part) == 1
        assert model[0].startswith("8 of the clipper's parameters, such as a.weight")
        assert "has not seen a gradient" in parameters[0]
        assert part[0].startswith("2 of the clipper's parameters, such as a.weight")
        assert all("fully_shard" in text for text in [*model, *parameters, *part])


@pytest.mark.parametrize("world", RANKS)
def test_experts_beside_shards_count_once(results, world):
    for rank in of(results, world, "experts_beside_shards"):
        for norm, wanted, scaled_back, gradient in rank["found"]:
            close(norm, wanted)
            close(scaled_back, gradient)


@pytest.mark.parametrize("world", RANKS)
def test_sharded_stages_share_one_norm(results, world):
    for rank in of(results, world, "sharded_stages"):
        close(rank["norm"], rank["wanted"])


def test_a_process_group_across_shards_is_refused(results):
    for rank in of(results, 4, "a_process_group_across_shards"):
        assert "process_group must be within the ranks" in rank["error"]


@pytest.mark.parametrize("world", RANKS)
def test_what_is_frozen_on_all_ranks_is_as_in_one_process(results, world):
    for rank in of(results, world, "frozen_on_all_ranks"):
        for sharded, alone in zip(rank["sharded"], rank["alone"], strict=True):
            close(sharded, alone)


@pytest.mark.parametrize("world", RANKS)
def test_stages_on_one_grid_are_no_copies_of_each_other(results, world):
    for rank in of(results, world, "stages_with_two_meshes_each"):
        wanted = [2.0, 2.0] if rank["stage"] == 0 else [20.0, 20.0]
        close(rank["norms"], wanted)


@pytest.mark.parametrize("world", RANKS)
def test_the_flat_parameters_of_fsdp1_are_refused(results, world):
    for rank in of(results, world, "flat_parameters_of_fsdp1"):
        assert "FSDP1" in rank["error"]
        assert "threshold()" in rank["error"]


@pytest.mark.parametrize("world", RANKS)
def test_an_infinity_in_one_shard_raises_on_all_ranks(results, world):
    errors = {r["error"] for r in of(results, world, "raise_on_a_nan_of_one_rank")}
    assert len(errors) == 1
    assert "is not finite" in errors.pop()


@pytest.mark.parametrize("world", RANKS)
def test_a_rank_without_gradients_enters_the_reduction(results, world):
    ranks = of(results, world, "a_rank_without_gradients")
    own = torch.tensor([rank["own"] for rank in ranks], dtype=torch.float64)
    for rank in ranks:
        close(rank["norms"], own.norm(dim=0).tolist())
        assert rank["state"] == ranks[0]["state"]


@pytest.mark.parametrize("world", RANKS)
def test_the_stages_of_a_pipeline_share_one_norm(results, world):
    ranks = of(results, world, "stages_of_a_pipeline")
    own = torch.tensor([rank["own"] for rank in ranks], dtype=torch.float64)
    for rank in ranks:
        close(rank["norms"], own.sum(0).sqrt().tolist())
    close(torch.tensor([rank["after"] for rank in ranks]).sum(0).tolist(), [1.0] * 3)


@pytest.mark.parametrize("world", RANKS)
def test_a_norm_that_is_a_dtensor_can_be_observed(results, world):
    alone = in_one_process("global")["decisions"][0][0]
    for rank in of(results, world, "observe_a_sharded_norm"):
        assert rank["kind"] == "DTensor"
        close(rank["norm"], alone)


def test_a_checkpoint_of_four_ranks_goes_on_with_two(results):
    saved = of(results, 4, "save_half_way")[0]
    for rank in of(results, 2, "load_half_way"):
        close(rank["decisions"], saved["decisions"])
        close(rank["weights"], saved["weights"], rtol=1e-4)


@pytest.mark.parametrize("world", RANKS)
def test_stages_with_other_rows_are_refused_on_every_rank(results, world):
    for number, rank in enumerate(of(results, world, "stages_with_other_rows")):
        words = f"got {2 + 2 * number} on this rank and 2 to {2 * world} on all"
        assert words in rank["error"]
        assert rank["grad"] == 1.0


@pytest.mark.parametrize("world", RANKS)
def test_removing_one_of_two_clippers_leaves_the_other_its_mark(results, world):
    for rank in of(results, world, "two_clippers_of_stages"):
        assert rank["marked"] == [["_step_supports_amp_scaling"]] * 2
        assert rank["left"] == []


@pytest.mark.parametrize("world", RANKS)
def test_a_value_clip_clamps_sums_and_not_their_summands(results, world):
    for rank in of(results, world, "sequence_parallel"):
        for whole, parts in zip(rank["found"][::2], rank["found"][1::2], strict=True):
            assert all("Partial" in kind for kind in parts["kinds"])
            assert max(whole["values"]) > 20.0
            close(parts["values"], whole["values"])
