"""Threshold policies for adaptive gradient clipping, and records of their decisions.

The package imports NumPy alone, and matplotlib inside the functions that draw. Read
`decision.py` first: `decide(policy, state, norms)` is the one step; it limits, scales
and records.
"""

__version__ = "0.1.0"

from .decision import Decision as Decision
from .decision import decide as decide
from .files.read import LoggedNorms as LoggedNorms
from .files.read import read_norms as read_norms
from .log.clip_log import ClipLog as ClipLog
from .log.metrics_logger import MetricsLogger as MetricsLogger
from .log.report import write_report as write_report
from .planning.replay import Replay as Replay
from .planning.replay import replay as replay
from .planning.suggest import Suggestion as Suggestion
from .planning.suggest import suggest_threshold as suggest_threshold
from .policies.combinators import Cap as Cap
from .policies.combinators import Floor as Floor
from .policies.combinators import Warmup as Warmup
from .policies.drop import Drop as Drop
from .policies.ema_ratio import EmaRatio as EmaRatio
from .policies.fixed import Fixed as Fixed
from .policies.mean_std import MeanStd as MeanStd
from .policies.param_ratio import ParamRatio as ParamRatio
from .policies.quantile import Quantile as Quantile
from .policies.schedule import Scheduled as Scheduled
from .policies.streaming_quantile import StreamingQuantile as StreamingQuantile
from .policies.zscore import ZScore as ZScore
from .policy import Policy as Policy
from .scale import Limit as Limit
