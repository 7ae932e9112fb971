"""One step of a log, read from plain numbers or from a decision.

A step of several rows is reduced to one number per field:

| field     | value for several rows                            |
|-----------|---------------------------------------------------|
| norm      | root of the sum of squares of the finite norms    |
| threshold | median of the finite thresholds; +inf if none is  |
| scale     | norm after / norm before; 1 if both are 0         |
| clipped   | clipped rows / observed rows, in [0, 1]           |
| finite    | False if an observed norm is NaN or infinite      |
| skipped   | True if any row was skipped                       |
| dropped   | True if any row was dropped                       |

A row that was not observed (norm NaN, finite True) is ignored. If no norm of a step is
finite, the step stores the NaN or infinity as its norm, scale NaN and clipped 0.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import format_error

from .statistics import Array as Array
from .statistics import median, root_sum_squares

FIELDS = ("norm", "threshold", "scale", "clipped", "finite")
OPTIONAL = ("skipped", "dropped")


class Step(NamedTuple):
    """The stored numbers of one step, as plain Python."""

    norm: float
    threshold: float
    scale: float
    clipped: float
    finite: bool
    skipped: bool
    dropped: bool = False


def step_from_numbers(norm: Any, threshold: Any, scale: Any, clipped: Any) -> Step:
    """Return a step of one row; compute scale and clipped if they are None."""
    if norm is None or threshold is None:
        given = dict(norm=norm, threshold=threshold, scale=scale, clipped=clipped)
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(
            "record needs a decision, or both norm and threshold, got "
            f"{', '.join(names) or 'nothing'}; if there is no threshold, "
            "write threshold=float('inf')"
        )
    norm, threshold = as_float("norm", norm), as_float("threshold", threshold)
    finite = math.isfinite(norm)
    is_above = norm > threshold
    scale = as_float("scale", scale) if scale is not None else None
    clipped = as_float("clipped", clipped) if clipped is not None else float(is_above)
    if not finite:
        return Step(norm, threshold, math.nan, 0.0, False, False)
    if scale is None:
        scale = threshold / norm if is_above else 1.0
    return Step(norm, threshold, scale, clipped, True, False)


def step_from_one_row(decision: object) -> Step | None:
    """Return the step of a NumPy decision with one row; None for any other decision.

    The result equals that of `reduce_rows`, without the cost of its arrays.
    """
    fields = [getattr(decision, name, None) for name in (*FIELDS, "skipped")]
    if not all(type(f) is np.ndarray and f.shape == (1,) for f in fields):
        return None
    dropped = bool(np.any(getattr(decision, "dropped", False)))
    norm, threshold, scale, clipped, finite = (
        as_float(name, field.item())  # type: ignore[union-attr]
        for name, field in zip(FIELDS, fields, strict=False)
    )
    skipped = bool(fields[-1])
    if not math.isfinite(threshold):
        threshold = math.inf
    if not (finite and math.isfinite(norm)):
        return Step(norm, threshold, math.nan, 0.0, bool(finite), skipped, dropped)
    return Step(norm, threshold, scale, clipped, True, skipped, dropped)


def read_decision(decision: object) -> dict[str, Array]:
    """Return the fields of a decision as float64 arrays of shape (rows,)."""
    names = [name for name in (*FIELDS, *OPTIONAL) if hasattr(decision, name)]
    missing = [name for name in FIELDS if name not in names]
    if missing:
        raise TypeError(
            f"decision must have the fields {', '.join(FIELDS)}, got a "
            f"{type(decision).__name__} without {', '.join(missing)}; "
            "pass plain numbers as norm=..., threshold=..."
        )
    fields = copy_to_cpu({name: getattr(decision, name) for name in names})
    rows = {name: as_floats(name, value) for name, value in fields.items()}
    shapes = {name: array.shape for name, array in rows.items()}
    if len(set(shapes.values())) > 1 or rows["norm"].ndim > 1:
        raise ValueError(
            f"decision's fields must all have the shape (rows,), got {shapes}; "
            "give each field one entry per row"
        )
    return rows


def copy_to_cpu(fields: dict[str, Any]) -> dict[str, Any]:
    """Copy a decision's fields from a device to the CPU, all in one transfer."""
    norm = fields["norm"]
    if not hasattr(norm, "new_empty") or norm.device.type == "cpu":
        return fields
    table = norm.detach().float().new_empty((len(fields), *norm.shape))
    for index, value in enumerate(fields.values()):
        table[index] = value.detach()
    return dict(zip(fields, table.cpu().numpy(), strict=True))


def as_float(name: str, value: Any) -> float:
    """Return one real number as a float; raise if it is outside the field's range."""
    if type(value) is not float:
        if getattr(value, "ndim", None) == 0:  # NumPy, torch, JAX, TensorFlow
            value = value.item() if hasattr(value, "item") else value.numpy().item()
        if not isinstance(value, int | float):
            array = as_floats(name, value)
            if array.size != 1:
                way_out = (
                    "for several rows, pass a decision; of metrics with a device axis, "
                    "pass one device: jax.tree.map(lambda x: x[0], metrics)"
                )
                raise ValueError(format_error(name, "one number", value, way_out))
            value = array.item()
        try:
            value = float(value)
        except OverflowError:  # an int of hundreds of digits
            value = math.inf if value > 0 else -math.inf
    if value < 0:  # NaN passes here: it is allowed except for `clipped`
        rule = "in [0, 1]" if name == "clipped" else ">= 0"
        raise ValueError(format_error(name, rule, value, ""))
    if name == "clipped" and not value <= 1:
        raise ValueError(format_error(name, "in [0, 1]", value, ""))
    number: float = value
    return number


def as_floats(name: str, value: object) -> Array:
    """Return real numbers as a float64 array with at least one dimension."""
    try:
        if hasattr(value, "detach"):  # a torch tensor, perhaps bfloat16 or on a device
            value = value.detach().cpu().double()
        array = np.asarray(value)
        if array.dtype.kind in "OSUMmc":
            raise TypeError(f"dtype {array.dtype}")
        array = np.atleast_1d(array).astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be real numbers that NumPy can read, got "
            f"{type(value).__name__} ({error}); pass plain numbers or arrays"
        ) from error
    rule, is_invalid = ">= 0", array < 0
    if name == "clipped":
        rule, is_invalid = "in [0, 1]", ~((array >= 0) & (array <= 1))
    if is_invalid.any():
        raise ValueError(format_error(name, rule, float(array[is_invalid][0]), ""))
    return array


def was_observed(rows: dict[str, Array]) -> Array:
    """Return which rows had a gradient; other rows have norm NaN and finite True."""
    observed: Array = ~(np.isnan(rows["norm"]) & (rows["finite"] != 0))
    return observed


def reduce_rows(rows: dict[str, Array]) -> Step:
    """Reduce the rows of one step as the table at the top of this file says."""
    norm, finite = rows["norm"], rows["finite"] != 0
    observed = was_observed(rows)
    measured = finite & np.isfinite(norm)
    threshold = median(rows["threshold"][np.isfinite(rows["threshold"])])
    is_skipped, is_dropped = (n in rows and bool(rows[n].any()) for n in OPTIONAL)
    flags = bool((measured == observed).all()), is_skipped, is_dropped
    if not measured.any():
        largest = float(norm[observed].max()) if observed.any() else math.nan
        return Step(largest, threshold, math.nan, 0.0, *flags)
    largest = float(norm[measured].max())
    share = norm[measured] / largest if largest else np.ones(measured.sum())
    before = root_sum_squares(share)
    after = root_sum_squares(rows["scale"][measured] * share)
    scale = after / before if largest else 1.0
    clipped = float(rows["clipped"][measured].sum() / observed.sum())
    return Step(largest * before, threshold, scale, clipped, *flags)
