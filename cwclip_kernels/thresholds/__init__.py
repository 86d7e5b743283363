"""Cap policies: what may be given as ``max_norm`` where one number for ever won't do.

    Fixed           what ``max_norm`` takes anyway
    Schedule        a function of the step
    RMS             caps the root mean square, whatever a component's size
    FromGlobal      a global budget shared out among the components
    ParamRelative   a share of the parameters' own norm (AGC)
    EMA             a little above a running mean of the component's norms (AdaGC)
    ZScore          outliers of a running mean and variance (ZClip)
    Percentile      a percentile of the norms so far (AutoClip)
    ByPattern       another of these for each pattern: what a mapping becomes
    Bounded         another's caps, with a floor and a ceiling

State lies on the device, is updated without a host sync, and is saved by ``state_dict()``. A norm that is inf or NaN,
or 0 because a component got no gradient, teaches nothing about that component; steps are counted all the same.
``Threshold`` is what to derive from for a policy of your own.

Example:
    >>> import torch
    >>> from cwclip_kernels import ComponentClipper, thresholds
    >>> model = torch.nn.Linear(2, 1)
    >>> clipper = ComponentClipper(model, thresholds.EMA(warmup_steps=100))
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> clipper.clip_().caps.dtype
    torch.float64
"""

from .adaptive import EMA, ParamRelative, Percentile, ZScore
from .base import Setting, Threshold
from .bounded import Bounded
from .by_pattern import ByPattern
from .constant import Fixed
from .schedule import RMS, FromGlobal, Schedule

__all__ = [
    "EMA",
    "RMS",
    "Bounded",
    "ByPattern",
    "Fixed",
    "FromGlobal",
    "ParamRelative",
    "Percentile",
    "Schedule",
    "Setting",
    "Threshold",
    "ZScore",
]
