"""The fault battery: series of gradients with faults, as they occur in training.

Each case is a series of steps. A step is one gradient per parameter, or None. The tests
run each case in each framework, and `account.check` checks the results.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

NAN, INF = np.nan, np.inf
SHAPES = [(4, 3), (5,), (2, 2, 2), (0, 3)]


def layout_of(dtype):
    """Return the layout of most cases, with all parameters of one type."""
    return tuple((shape, dtype) for shape in SHAPES)


def rounded(array, dtype):
    """Return the array in another type; a float32 array stores bfloat16 values."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    return (array.astype("float32").view("uint32") & 0xFFFF0000).view("float32")


@dataclass(frozen=True)
class Case:
    """A series of gradients."""

    steps: int
    fault: Callable[[int, list], list]
    """A function of a step and its sound gradients; it returns the gradients to use."""
    layout: tuple = layout_of("float32")
    """Shape and type of each parameter."""
    sizes: Callable[[int], float] = lambda step: 1.0
    """The level of the gradients at a step."""
    exact: bool = False
    """Whether every norm is a whole number times the level, without rounding."""

    def series(self):
        """Yield the gradients of each step."""
        rng = np.random.default_rng(0)
        for step in range(self.steps):
            draw = draw_exact if self.exact else draw_random
            grads = [
                self.sizes(step) * draw(row, shape, rng)
                for row, (shape, _) in enumerate(self.layout)
            ]
            yield [
                None if grad is None else rounded(grad, dtype)
                for grad, (_, dtype) in zip(
                    self.fault(step, grads), self.layout, strict=True
                )
            ]


def draw_random(row, shape, rng):
    """Return a gradient of random direction with a log-normal norm."""
    direction = rng.standard_normal(shape)
    return direction * np.exp(0.4 * rng.standard_normal()) / norm_or_one(direction)


def norm_or_one(direction):
    return np.linalg.norm(direction) or 1.0


def draw_exact(row, shape, rng):
    """Return four equal elements: the norms are 2, 4 and 4, and 6 in total."""
    grad = np.zeros(shape)
    grad.flat[:4] = 1.0 if row == 0 else 2.0
    return grad


def at(steps, change):
    """Return a fault at these steps, with sound gradients at the others."""
    return lambda step, grads: change(grads) if step in steps else grads


def element(value, tensor=0):
    """Return a change: one element of one tensor becomes `value`."""

    def change(grads):
        grads[tensor].flat[1] = value
        return grads

    return change


def tensor(value, which=1):
    """Return a change: all elements of one tensor become `value`."""

    def change(grads):
        grads[which][...] = value
        return grads

    return change


def everything(value):
    """Return a change: all elements of all tensors become `value`."""
    return lambda grads: [np.full_like(grad, value) for grad in grads]


def absent(*which):
    """Return a change: these parameters have no gradient."""
    return lambda grads: [None if i in which else g for i, g in enumerate(grads)]


def signs(grads):
    grads[0].flat[:2] = INF, -INF
    grads[2].flat[:2] = NAN, INF
    return grads


def nan_then_absent(step, grads):
    if step in range(5, 10):
        return element(NAN)(grads)
    return absent(0)(grads) if step in range(10, 15) else grads


def times(factor):
    return lambda grads: [grad * factor for grad in grads]


def sound(step, grads):
    return grads


CASES = {
    f"{name} in {where}, {when}": Case(30, at(steps, change(value)))
    for value, name in [(NAN, "nan"), (INF, "inf"), (-INF, "-inf")]
    for where, change in [
        ("one element", element),
        ("one tensor", tensor),
        ("all", everything),
    ]
    for when, steps in [
        ("first", [0]),
        ("while the window fills", [2, 3]),
        ("in the middle", [15, 20]),
    ]
} | {
    "nothing": Case(30, sound),
    "100 steps of nan in a row": Case(125, at(range(12, 112), everything(NAN))),
    "100 steps of inf in one tensor": Case(125, at(range(12, 112), element(INF))),
    "an fp16 run that starts with overflows": Case(
        30, at([0, 1, 4], everything(INF)), layout_of("float16")
    ),
    "inf, -inf and nan at once": Case(20, at([9], signs)),
    "nan in all but one": Case(20, at([9], lambda g: [g[0], *everything(NAN)(g[1:])])),
    "squares that overflow": Case(24, at([7, 15], times(1e30))),
    "squares that underflow": Case(24, at([7, 15], times(1e-30))),
    "subnormal elements": Case(24, at([7, 15], times(1e-39))),
    "zero in one tensor": Case(24, at([0, 7, 8], tensor(0.0))),
    "all zero": Case(24, at([0, 7, 8], everything(0.0))),
    "zeros below 0": Case(24, at([7, 8], everything(-0.0))),
    "no gradient at all": Case(24, at([0, 7, 8], absent(*range(len(SHAPES))))),
    "a parameter that appears": Case(24, at(range(10), absent(1))),
    "a parameter that vanishes": Case(24, at(range(10, 24), absent(2))),
    "a parameter that comes and goes": Case(30, at(range(0, 30, 3), absent(0))),
    "nan, then absent, then back": Case(24, nan_then_absent),
    "a level ten times as high": Case(
        40, sound, sizes=lambda s: 10.0 if s > 15 else 1.0
    ),
    "a level of a tenth": Case(40, sound, sizes=lambda s: 0.1 if s > 15 else 1.0),
    "a drift by a factor of 1000": Case(60, sound, sizes=lambda s: 10 ** (s / 20)),
    "one spike": Case(30, at([12], times(1e6))),
    "every other step a spike": Case(30, at(range(1, 30, 2), times(50.0))),
    "constant norms": Case(20, sound, exact=True),
    "two levels": Case(30, at(range(15, 30), times(0.5)), exact=True),
    "ties": Case(30, sound, sizes=lambda s: [1.0, 2.0, 2.0, 0.5][s % 4], exact=True),
    "a huge learning signal": Case(24, sound, sizes=lambda s: 1e25),
    "a tiny learning signal": Case(24, sound, sizes=lambda s: 1e-25),
    "both by turns": Case(24, sound, sizes=lambda s: [1e15, 1e-15][s % 2]),
    "a norm above every float32": Case(24, at([7, 15], everything(3e38))),
    **{
        dtype: Case(24, at([9], element(INF)), layout_of(dtype))
        for dtype in ("float16", "bfloat16", "float64")
    },
    "a float16 norm above its largest": Case(
        24, at([9, 10], everything(6e4)), layout_of("float16")
    ),
}


KINDS = {
    "sound": lambda grad: grad,
    "absent": lambda grad: None,
    "nan": lambda grad: np.full_like(grad, NAN),
    "an inf": lambda grad: np.where(grad == grad.max(initial=-INF), -INF, grad),
    "zero": np.zeros_like,
    "large": lambda grad: grad * 1e3,
    "small": lambda grad: grad * 1e-2,
}
MATRIX, VECTOR, CUBE, EMPTY = layout_of("float32")
HALF, SCALAR = ((4, 3), "float16"), ((), "bfloat16")
LAYOUTS = [
    (MATRIX, VECTOR, CUBE, EMPTY),
    (VECTOR, HALF, SCALAR, CUBE),
    (SCALAR, EMPTY, MATRIX, HALF),
    (CUBE, VECTOR, HALF, VECTOR),
]
"""Four layouts, for frameworks that compile for each shape and type."""


@st.composite
def layouts(draw):
    """Draw any shapes, each of any type."""
    shape = st.lists(st.integers(0, 6), max_size=3).map(tuple)
    dtype = st.sampled_from(["float32", "float16", "bfloat16", "float64"])
    return tuple(draw(st.lists(st.tuples(shape, dtype), min_size=1, max_size=5)))


@st.composite
def drawn(draw, layouts=st.sampled_from(LAYOUTS)):  # noqa: B008
    """Draw any case: each parameter has any kind of gradient at each step."""
    layout = draw(layouts)
    kind = st.sampled_from([*KINDS, *["sound"] * len(KINDS)])
    step = st.tuples(*(kind for _ in layout))
    kinds = draw(st.lists(step, min_size=2, max_size=15))
    narrow = any(dtype == "float16" for _, dtype in layout)
    level = 1.0 if narrow else draw(st.sampled_from([1e-20, 1e-3, 1.0, 1e10]))

    def fault(step, grads):
        pairs = zip(kinds[step], grads, strict=True)
        return [KINDS[kind](grad) for kind, grad in pairs]

    return Case(len(kinds), fault, layout, lambda step: level)
