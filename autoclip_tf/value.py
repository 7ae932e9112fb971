"""`ValueClip`: clip every element of a gradient to an interval."""

from typing import Any, Unpack

import keras
import numpy as np
from keras import ops

from autoclip_core import Decision, Fixed
from autoclip_core.checks import check_positive
from autoclip_core.clipper.by_value import decide_by_value
from autoclip_core.clipper.parts import get_part_scales
from autoclip_core.clipper.settings import ClipperKeywords

from .clipper import Clipper
from .gradients import namespace
from .gradients.measure import find_largest, find_observed_rows, measure_rows
from .gradients.row_tensor import RowTensor
from .gradients.rows import Rows
from .gradients.scale import map_elements, scale_all


@keras.saving.register_keras_serializable("autoclip_tf")
class ValueClip(Clipper):
    """Clip each element to [-clip_value, clip_value], and report the change of norms.

    This is not a policy: it also changes the direction of a gradient. In the decision,
    `norm` is the norm before, `threshold` is the clip value, and `scale` is the norm
    after divided by the norm before. `clipped` is True if any element of the row
    changed. With `nonfinite="propagate"` an infinite element is clipped like any other,
    and a NaN stays.

    Args:
      clip_value: the largest magnitude, > 0.
      scope, global_clipping, norm, nonfinite, exclude, scale_only, dry_run: as in
        `Clipper`. With `scale_only`, the elements of other variables are not clipped.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight = keras.Variable([0.0, 0.0])
    >>> clip = ValueClip(3.5)
    >>> [(gradient, _)] = clip([(ops.convert_to_tensor([3.0, 4.0]), weight)])
    >>> ops.convert_to_numpy(gradient), clip.decision.norm
    (array([3. , 3.5], dtype=float32), array([5.], dtype=float32))
    """

    _keywords = ClipperKeywords

    def __init__(self, clip_value: float, **keywords: Unpack[ClipperKeywords]) -> None:
        self.clip_value = check_positive("clip_value", clip_value)
        super().__init__(Fixed(self.clip_value), **keywords)

    def _arguments(self) -> dict[str, Any]:
        return {"clip_value": self.clip_value}

    def _step(self, tensors: list[RowTensor], rows: Rows) -> list[Any]:
        """Clamp every element; decide by the norms before and after."""
        scaled = [item for item in tensors if rows.is_scaled(item.rows)]
        clamped = [
            item._replace(tensor=self._clamp(item))
            if rows.is_scaled(item.rows)
            else item
            for item in tensors
        ]
        row_count = len(rows.names)
        is_changed = find_largest(scaled, row_count) > self.clip_value
        decision = decide_by_value(
            measure_rows(tensors, rows),
            measure_rows(clamped, rows),
            is_changed,
            thresholds=ops.full((row_count,), self.clip_value, "float32"),
            observed=find_observed_rows(tensors, rows),
            nonfinite=self._settings.nonfinite,
            xp=namespace,
        )
        state = self._state.read()
        self._state.write_step(decision, state.tally, state.policy)
        return self._apply(decision, tensors, clamped, rows)

    def _apply(
        self,
        decision: Decision,
        tensors: list[RowTensor],
        clamped: list[RowTensor],
        rows: Rows,
    ) -> list[Any]:
        """Return the gradients to step with: 0 in a row that is not finite."""
        if self.dry_run or not tensors:
            return [item.tensor for item in tensors]
        if self._settings.nonfinite == "propagate":
            return [item.tensor for item in clamped]
        scales = ops.where(decision.finite, 1.0, 0.0)
        if rows.is_split:
            scales = get_part_scales(decision._replace(scale=scales), namespace)
        return scale_all(clamped, scales)

    def _clamp(self, item: RowTensor) -> Any:
        limit = np.float32(self.clip_value)

        def clamp(values: Any) -> Any:
            # Not `ops.clip`: TensorFlow's sets subnormal elements to 0.
            is_beyond = ops.abs(values) > ops.cast(limit, values.dtype)
            return ops.where(is_beyond, ops.sign(values) * limit, values)

        return map_elements(clamp, item)
