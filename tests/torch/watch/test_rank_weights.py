"""Ranks that hold different parameters and clip by the norm of their own.

One process runs `support/torch_rank_weights.py`, which starts two gloo ranks.
"""

import json

import pytest
from torch import nn

from ...support.run_module import run_module
from ...support.torch_rank_weights import NONE, ONE, network


@pytest.fixture(scope="module")
def warnings_of(tmp_path_factory):
    """Return the warnings of each rank in each case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_module("torch_rank_weights", folder, timeout=300)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]

    def read(case):
        for rank in ranks:
            assert "failed" not in rank[case], rank[case]["failed"]
        return [rank[case] for rank in ranks]

    return read


@pytest.mark.parametrize("case", [case.__name__ for case in ONE])
def test_different_parameters_warn_once_on_each_rank(warnings_of, case):
    for rank, texts in enumerate(warnings_of(case)):
        (text,) = texts
        assert f"rank {rank} and rank {1 - rank} hold different parameters" in text
        assert "process_group" in text
        assert "replicated" in text


@pytest.mark.parametrize("case", [case.__name__ for case in NONE])
def test_other_runs_do_not_warn(warnings_of, case):
    assert warnings_of(case) == [[], []]


def test_a_warning_has_the_numbers_of_both_ranks(warnings_of):
    first, _, last = network()
    numbers = [
        f"{8 * 6 + 6} elements of norm {norm(first):.4g}",
        f"{6 + 1} elements of norm {norm(last):.4g}",
    ]
    texts = warnings_of("stages_by_hand")
    assert f"({'; '.join(numbers)})" in texts[0][0]
    assert f"({'; '.join(numbers[::-1])})" in texts[1][0]


def norm(layer):
    return nn.utils.parameters_to_vector(layer.parameters()).norm().item()
