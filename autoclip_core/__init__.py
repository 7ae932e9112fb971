"""Threshold policies for adaptive gradient clipping, in NumPy alone.

`decide(policy, state, norms)` is the one step: it limits, scales and records.
Everything else here is a policy, or tells what a run did.
"""

__version__ = "0.1.0"

from .combine import Cap as Cap
from .combine import Drop as Drop
from .combine import Floor as Floor
from .combine import Warmup as Warmup
from .ema import EmaRatio as EmaRatio
from .ema import ZScore as ZScore
from .fixed import Fixed as Fixed
from .log import ClipLog as ClipLog
from .log_send import MetricsLogger as MetricsLogger
from .mean_std import MeanStd as MeanStd
from .param_ratio import ParamRatio as ParamRatio
from .policy import Decision as Decision
from .policy import Limit as Limit
from .policy import Policy as Policy
from .policy import decide as decide
from .quantile import Quantile as Quantile
from .quantile import StreamingQuantile as StreamingQuantile
from .replay import Replay as Replay
from .replay import replay as replay
from .report import write_report as write_report
from .suggest import Suggestion as Suggestion
from .suggest import suggest_threshold as suggest_threshold
