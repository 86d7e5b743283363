"""Mixture of experts: each rank of an expert-parallel group has other experts, under the same names."""

from __future__ import annotations

import re

from ....components.parameters import NamedTensors
from ....core.parameter_clipper import ParameterClipper

_EXPERT = re.compile(r"^(.*\bdeepspeed_experts\.\d+)\.")


def check_experts(named: NamedTensors, clipper: ParameterClipper, learns: bool) -> bool:
    """Whether there are experts that not all ranks have; raises if they can't be clipped.

    Raises:
        ValueError: a component isn't within one expert, so that its norm would have to be summed over ranks with
            other experts; or caps learn, and would learn something else on each rank.
    """
    experts = {i for i, p in enumerate(named.tensors) if getattr(p, "allreduce", True) is False}
    if not experts:
        return False
    if learns:
        raise ValueError(
            "max_norm: caps that learn aren't served with experts, of which each rank has others: checkpoints would "
            "keep what one rank has learnt; use caps that don't learn"
        )
    for position, component, _ in clipper.members:
        name, key = named.names[position], clipper.names[component]
        found = _EXPERT.match(name)
        # A component within one expert is named after it; so one expert a rank is judged as several are.
        if position in experts and not key.startswith(found.group(1) if found else name):
            raise ValueError(
                f"components: {key!r} has {name!r} of an expert, of which each rank has others, so that its norm "
                'would not be whole; choose components within one expert, such as "parameter" or "module"'
            )
    return True
