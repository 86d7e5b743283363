"""Mixture of experts: each rank of an expert-parallel group has other experts, under the same names."""

from __future__ import annotations

import re
from typing import Any

from ....components.parameters import NamedTensors
from ....core.parameter_clipper import ParameterClipper

_EXPERT = re.compile(r"^(.*\bdeepspeed_experts\.\d+)\.")


def check_experts(engine: Any, named: NamedTensors, clipper: ParameterClipper, learns: bool) -> bool:
    """Whether there are experts that not all ranks have; raises if they can't be clipped.

    Raises:
        ValueError: a component has parameters of an expert beside others, so that its norm would have to be summed
            over ranks with other experts; or caps learn, and would learn something else on each rank.
    """
    experts = {i for i, p in enumerate(named.tensors) if getattr(p, "allreduce", True) is False}
    if not experts:
        return False
    if learns:
        raise ValueError(
            "max_norm: caps that learn aren't served with experts, of which each rank has others: checkpoints would "
            "keep what one rank has learnt; use caps that don't learn"
        )
    owners: dict[int, set[str]] = {}
    for position, component, _ in clipper.members:
        name = named.names[position]
        found = _EXPERT.match(name)
        owner = (found.group(1) if found else name) if position in experts else ""
        owners.setdefault(component, set()).add(owner)
    for component, several in owners.items():
        if len(several) > 1 and several != {""}:
            raise ValueError(
                f"components: {clipper.names[component]!r} has parameters of an expert beside others, and each rank "
                "has other experts, so that its norm would not be whole; choose components within one expert, such "
                'as "parameter" or "module"'
            )
    return True
