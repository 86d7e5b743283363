"""Set-up: how components are spread over ranks, once it is sure that these mean the same by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from ..components.membership import Components
from . import local
from .consistency import agree
from .groups import Group, along, as_group
from .reduction_plan import Spread, neighbours_of
from .shards import Layout, is_dtensor, is_flattened, layout_of, place_of


def spread_of(
    components: Components, tensors: Sequence[Tensor], process_group: object, pp_mesh: object, settings: str
) -> tuple[Components, Spread | None]:
    """How components are spread over ranks; None if every tensor is all that there is to it.

    Where something is spread, the ranks that share it make this call together, to compare their components.

    Returns:
        The components, with the problems of frozen parameters that could not be clipped so; and how they are spread.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be, or parameters that can't be clipped so; on
            all ranks alike if these don't have the same components.
    """
    group, stages = as_group(process_group, "process_group"), as_group(pp_mesh, "pp_mesh")
    layouts, problems = _layouts(components, tensors, group)
    problem = next((problem for position, problem in problems if tensors[position].requires_grad), None)
    if group is None and stages is None and problem is None and not any(layouts):
        return components, None
    frozen = [(position, str(p)) for position, p in problems if not tensors[position].requires_grad]
    components = replace(components, problems=(*components.problems, *frozen))
    _compare(components, tensors, layouts, group, stages, problem, settings)
    return components, Spread(components, tensors, layouts, group, stages)


def _layouts(
    components: Components, tensors: Sequence[Tensor], group: Group | None
) -> tuple[local.Layouts, list[tuple[int, ValueError]]]:
    """How each tensor is held here; and what is wrong with which, perhaps on this rank alone."""
    layouts: list[Layout | None] = []
    problems: list[tuple[int, ValueError]] = []
    has_parts = group is not None and any(map(is_flattened, tensors))
    for position, (tensor, name) in enumerate(zip(tensors, components.tensor_names, strict=True)):
        layout = place_of(tensor)
        try:
            layout = layout_of(tensor, name)
            if is_flattened(tensor) and dist.get_world_size() > 1:
                _check_flattened(tensor, name, layout, group)
            elif has_parts:
                _check_part(tensor, name)
        except ValueError as found:
            problems.append((position, found))
        layouts.append(layout)
    if group is not None:
        problems += local.cut_parts(components, layouts)
    return layouts, problems


def _compare(
    components: Components,
    tensors: Sequence[Tensor],
    layouts: local.Layouts,
    group: Group | None,
    stages: Group | None,
    problem: ValueError | None,
    settings: str,
) -> None:
    """Raises on all ranks if these don't mean the same. No group is made before, which takes all of its ranks."""
    neighbours = neighbours_of(group, layouts)
    # Frozen parameters that each rank has for itself are none of the others' business.
    shared_or_trained = [
        group is not None or layout is not None or tensor.requires_grad
        for tensor, layout in zip(tensors, layouts, strict=True)
    ]
    if stages is None:
        agree(neighbours, local.statement(components, layouts, shared_or_trained), problem, settings)
        return
    for shared in neighbours:  # whose other components are none of this rank's business
        mine = [
            (group is not None and group.ranks == shared.ranks)
            if layout is None or layout.mesh is None
            else shared.ranks in along(layout.mesh)
            for layout in layouts
        ]
        try:
            agree([shared], local.statement(components, layouts, mine))
        except ValueError as found:
            problem = problem or found
    agree([*neighbours, stages], {}, problem, settings)


def _check_flattened(tensor: Tensor, name: str, layout: Layout | None, group: Group | None) -> None:
    """Raises unless this parameter of ``FullyShardedDataParallel`` is a part of it, and it is known whose."""
    if group is None:
        raise ValueError(
            f"parameters: FullyShardedDataParallel keeps a part of {name!r} on each rank; pass "
            f"process_group=model.process_group ({_NO_SHARD})"
        )
    # A part is a stretch of the flattened parameter: of one dimension, and shorter than all of it.
    if tensor.ndim > 1 or (layout is not None and layout.local_shape >= layout.shape):
        raise ValueError(
            f"parameters: {name!r} of FullyShardedDataParallel is whole here, not the part that gradients have; "
            f"leave summon_full_params() first ({_NO_SHARD})"
        )


def _check_part(tensor: Tensor, name: str) -> None:
    """Raises if a tensor beside parts of ``FullyShardedDataParallel`` isn't one."""
    if not is_flattened(tensor) and not is_dtensor(tensor):
        raise ValueError(
            f"parameters: {name!r} is none of those that FullyShardedDataParallel keeps parts of, such as one "
            "that it was told to ignore; added up over process_group it would count several times. Clip it "
            "apart from the others, without process_group"
        )


_NO_SHARD = "under ShardingStrategy.NO_SHARD, where each rank keeps all, use DistributedDataParallel instead"
