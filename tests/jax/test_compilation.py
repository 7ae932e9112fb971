"""What one more leaf adds to a compiled step, by scope: operations, but no code."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest

from autoclip_core import Fixed
from autoclip_jax import (
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    trust_clip,
)

CLIPPERS = {
    "global": clip_by_policy(Fixed(1.0), scope="global"),
    "parameter": clip_by_policy(Fixed(1.0)),
    "unit": clip_by_policy(Fixed(1.0), scope="unit"),
    "labels, window": clip_by_quantile(
        labels=lambda leaves: [0, 1] * (len(leaves) // 2)
    ),
    "parameter, window": clip_by_quantile(),
    "AGC": clip_by_param_ratio(),
    "trust": trust_clip(optax.sgd(0.1)),
}


def lower(tx, count):
    """Return a lowered step on so many leaves of one shape."""
    leaves = [jnp.full((5, 4), i, jnp.float32) for i in range(count)]
    return jax.jit(tx.update).lower(leaves, tx.init(leaves), leaves)


def count_operations(tx, count):
    """Return how often each operation occurs once XLA has inlined all functions."""
    parts = re.split(r"func\.func \w+ @(\w+)", lower(tx, count).as_text())
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))

    def count_in(name):
        total = Counter(re.findall(r" = \"?(\w+\.\w+)", bodies[name]))
        for callee in re.findall(r" call @(\w+)", bodies[name]):
            total += count_in(callee)
        return total

    return count_in("main")


@pytest.mark.parametrize(
    ("scope", "most", "reshapes"),
    [
        ("global", 17, 1),
        ("unit", 22, 1),
        ("labels, window", 17, 1),
        ("parameter, window", 22, 2),
        ("AGC", 26, 1),
        ("trust", 46, 3),
    ],
)
def test_a_leaf_adds_few_operations_and_no_branch(scope, most, reshapes):
    few, many = (count_operations(CLIPPERS[scope], count) for count in (10, 20))
    assert few["stablehlo.reduce"]
    added = {name: (many[name] - few[name]) / 10 for name in many}
    assert sum(added.values()) <= most, added
    assert added["stablehlo.case"] == 0
    # XLA moves a reshape past one operation per pass over the module. With a reshape
    # in the sum of all leaves, the time to compile grows as the square of their number.
    assert added.get("stablehlo.reshape", 0) <= reshapes, added


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_xla_compiles_the_same_loops_for_any_number_of_leaves(scope):
    """XLA compiles equal loops once, and those of leaves of one shape are equal."""
    loops = []
    for count in (9, 12):  # XLA fuses what joins up to 8 leaves
        text = lower(CLIPPERS[scope], count).compile().as_text()
        bodies = re.findall(r"^%fused_computation\S* .*?^}", text, re.DOTALL | re.M)
        names = r"%[\w.\-]+|param_[\d.]+|metadata={.*?}"
        loops.append(len({re.sub(names, "", body) for body in bodies}))
    assert loops[0] == loops[1] > 0


@pytest.mark.parametrize("count", [4, 32])
@pytest.mark.parametrize("scope", ["global", "parameter", "unit", "AGC"])
def test_a_step_does_not_copy_all_leaves(scope, count):
    """The pass that repeats a sum stacks leaves of 4 MiB at most, which copies them."""
    leaves, tx = [jnp.ones((2**23 // count, 1))] * count, CLIPPERS[scope]
    step = jax.jit(tx.update, donate_argnums=0)
    compiled = step.lower(leaves, tx.init(leaves), leaves).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < count * leaves[0].nbytes / 2
