"""Ranks that agree pass the check; a rank that differs is named on every rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from autoclip_core import Quantile, StreamingQuantile
from autoclip_core.clipper.metrics import Tally
from autoclip_torch import Clipper, QuantileClip, ZClip
from autoclip_torch.agreement import _make_digests, check_agreement

WORLD = 3


def stepped(clipper, norms):
    """Return the clipper after one step per norm."""
    for norm in norms:
        for entry in clipper._policy_states.rows.by_parameter:
            entry.parameter.grad = torch.full_like(entry.parameter, norm)
        clipper.step()
    return clipper


def quantile(parameters, **keywords):
    return QuantileClip(parameters, **{"history_length": 4, **keywords})


def model():
    return nn.Linear(3, 2)


def alike(rank):
    return stepped(quantile(model()), [1.0, 3.0, float("nan"), 2.0, 9.0])


def untouched(rank):
    return quantile(model())


def several_policies(rank):
    layers = nn.Sequential(model(), model())
    groups = [
        {"params": layers[0]},
        {"params": layers[1], "policy": StreamingQuantile(0.5)},
    ]
    return stepped(Clipper(groups, Quantile(0.5, history_length=None)), [1.0, 3.0])


def stages(rank):
    """Each rank has its own parameters; all ranks share one norm."""
    stage = nn.Linear(3 + rank, 2)
    clipper = ZClip(stage, warmup_steps=2, process_group=dist.group.WORLD)
    return stepped(clipper, [1.0, 2.0, 3.0 + rank])


def stages_without_a_group(rank):
    return stepped(quantile(nn.Linear(3 + rank, 2), scope="global"), [1.0, 2.0])


def another_norm(rank):
    return stepped(quantile(model()), [1.0, 5.0 if rank == 1 else 2.0])


def a_step_more(rank):
    return stepped(quantile(model()), [2.0] * (7 if rank == 2 else 6))


def the_last_bit(rank):
    clipper = stepped(quantile(model()), [2.0])
    ring = clipper._policy_states.states[0].ring
    ring[0, 0] = torch.tensor(ring[0, 0]).nextafter(torch.tensor(9.0))
    return clipper if rank == 0 else stepped(quantile(model()), [2.0])


def another_quantile(rank):
    return quantile(model(), quantile=0.5 if rank == 1 else 0.9)


def each_another(rank):
    return stepped(quantile(model()), [1.0 + rank])


AGREE = [alike, untouched, several_policies, stages]
DIFFER = {
    another_norm: "rank 1 (history, last decision)",
    a_step_more: "rank 2 (history, counts)",
    the_last_bit: "rank 0 (history)",
    another_quantile: "rank 1 (settings)",
    each_another: "rank 1 (history, last decision); rank 2 (history, last decision)",
}


def attempt(clipper, group=None):
    """Return what the check returns, or its error message."""
    try:
        return check_agreement(clipper, group)
    except RuntimeError as error:
        return str(error)


def found_by(rank):
    """Return what this rank's check says in each case."""
    cases = [*AGREE, *DIFFER, stages_without_a_group]
    reports = {case.__name__: attempt(case(rank)) for case in cases}
    pairs = [dist.new_group([0, 2]), dist.new_group([1])]
    reports["a group"] = attempt(another_norm(rank), pairs[rank % 2])
    return reports


def main(rank, folder):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found_by(rank)))
    dist.barrier()
    dist.destroy_process_group()


def start(folder):
    """Start the ranks; forked ranks do not import torch again."""
    torch.multiprocessing.start_processes(
        main, args=(folder,), nprocs=WORLD, start_method="fork"
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return what each rank's check says: reports[rank][case]."""
    folder = tmp_path_factory.mktemp("agreement")
    code = f"import sys; from {__name__} import start; start(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(WORLD)]


@pytest.mark.parametrize("case", AGREE, ids=lambda case: case.__name__)
def test_ranks_that_agree_pass(reports, case):
    assert [rank[case.__name__] for rank in reports] == [None] * WORLD


@pytest.mark.parametrize("case", DIFFER, ids=lambda case: case.__name__)
def test_every_rank_reports_which_rank_differs_and_how(reports, case):
    for rank in reports:
        assert f"differ from the others: {DIFFER[case]};" in rank[case.__name__]


def test_stages_without_a_group_are_named_as_a_cause(reports):
    for rank in reports:
        error = rank["stages_without_a_group"]
        assert "stages of a pipeline, share one norm only with" in error
        assert error.endswith('scope="global" and process_group')


def test_only_the_ranks_of_a_group_are_compared(reports):
    """Rank 1 has another norm and is not in the group of ranks 0 and 2."""
    assert [rank["a group"] for rank in reports] == [None] * WORLD


def test_one_process_passes():
    assert check_agreement(untouched(0)) is None


@pytest.mark.parametrize("count", Tally._fields)
def test_every_count_is_compared(count):
    clipper = alike(0)
    states, before = clipper._policy_states, _make_digests(clipper)
    more = getattr(states.tally, count) + np.int32(1)
    states.tally = states.tally._replace(**{count: more})
    after = _make_digests(clipper)
    assert [part for part in before if before[part] != after[part]] == ["counts"]
