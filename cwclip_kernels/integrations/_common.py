"""What several integrations need: one checked call that clips, optimizers, FSDP 1, skipped steps, who else clips."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import type_name, warn_caller
from ..attachment import check_not_in_backward, clipping_too, parameters_of
from ..clipper import ComponentClipper
from ..components.parameters import NamedTensors, Parameters, named_tensors
from ..components.spec import Grouping
from ..core.cache import engine_for
from ..core.engine import Options, check_options, settings_in_words
from ..core.options import ClipOptions
from ..distributed.groups import Group
from ..distributed.shards import is_flattened
from ..grad_scaler import ComponentClipGradScaler
from ..thresholds import Threshold
from ..thresholds.caps import MaxNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# -----------------------------------------------------------------------------------------------------------
# Clipping
# -----------------------------------------------------------------------------------------------------------


def checked(norm_type: float, error_if_nonfinite: bool, options: ClipOptions) -> Options:
    """The scalar options, checked; TypeError or ValueError names the one that is wrong or unknown."""
    unknown = options.keys() - ClipOptions.__annotations__.keys()
    if unknown:
        known = ", ".join(ClipOptions.__annotations__)
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}; the options are {known}")
    eps, nonfinite = options.get("eps", 1e-6), options.get("nonfinite", "propagate")
    return check_options(norm_type, error_if_nonfinite, eps, nonfinite, options.get("backend"))


class ClipCall:
    """One call that clips, for functions that replace a trainer's. Nothing else here uses the engine itself."""

    def __init__(
        self,
        parameters: Parameters,
        max_norm: MaxNorm,
        options: Options,
        components: Grouping = None,
        process_group: object = None,
        pp_mesh: object = None,
    ) -> None:
        settings = partial(settings_in_words, options, max_norm, pp_mesh)
        self.tensors, self.engine = engine_for(parameters, components, settings, process_group, pp_mesh)
        self.max_norm = max_norm
        self._options = options

    def check(self) -> None:
        """Raises TypeError or ValueError now if ``max_norm`` is wrong."""
        self.engine.policy(self.max_norm, self.tensors, self._options.rule)

    def clip_(self) -> Tensor:
        """Clips, and returns the norms before: [K]."""
        policy = self.engine.policy(self.max_norm, self.tensors, self._options.rule)
        return self.engine.clip_(self.tensors, policy, self._options)[0]

    def total_norm(self, norms: Tensor) -> Tensor:
        """The norm of all components together: []."""
        return self.engine.total(norms, self._options.rule.norm_type)


def clipper_of(
    model: nn.Module, max_norm: MaxNorm, owner: nn.Module, is_scaled: bool, **options: Any
) -> tuple[ComponentClipper, list[Tensor]]:
    """A clipper of a trainer's model, and the frozen parameters that it leaves out (see ``without_whole_frozen``).

    Args:
        model: whose names count.
        max_norm: as for ``ComponentClipper``.
        owner: the model as the trainer runs it, which FSDP may have wrapped.
        is_scaled: whether the loss is scaled.
        options: as for ``ComponentClipper``.
    """
    source, left_out = without_whole_frozen(model)
    if options.get("process_group") is None:
        options["process_group"] = group_of(named_tensors(source), [owner])
    clipper = ComponentClipper(source, max_norm, **options)
    check_not_in_backward(clipper, clipper.parameters)
    if is_scaled and clipper.raises_nonfinite:
        raise ValueError(
            "nonfinite: 'error' (error_if_nonfinite=True) can't be used with a scaled loss, whose norms are inf now "
            "and then, when the step is skipped; use 'propagate', 'zero' or 'skip'"
        )
    return clipper, left_out


def as_given(max_norm: MaxNorm) -> MaxNorm:
    """``max_norm`` for a later ``is_same_cap``: a mapping is copied."""
    return dict(max_norm) if isinstance(max_norm, Mapping) else max_norm


def is_same_cap(one: MaxNorm, other: MaxNorm) -> bool:
    """Whether a clipper that was made with the one, ``as_given``, serves for the other."""
    if one is other or isinstance(one, Tensor | Threshold):
        return one is other
    return type(one) is type(other) and one == other


# -----------------------------------------------------------------------------------------------------------
# Optimizers, and steps that a loss scaler skips
# -----------------------------------------------------------------------------------------------------------


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a trainer's wrappers, which is the one that a ``GradScaler`` knows."""
    while any(kind.__name__ in ("AcceleratedOptimizer", "LightningOptimizer") for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def owning(optimizers: Iterable[Optimizer], tensors: Iterable[Tensor]) -> Iterator[Optimizer]:
    """Those of the optimizers that own any of the tensors."""
    ids = set(map(id, tensors))
    return (o for o in optimizers if any(id(p) in ids for p in parameters_of(o)))


def learner(max_norm: MaxNorm | None) -> Threshold | None:
    """The threshold whose caps change with the steps, so that checkpoints need its state; None for other caps."""
    if isinstance(max_norm, Threshold) and type(max_norm).update_ is not Threshold.update_:
        return max_norm
    return None


@contextmanager
def learning_unless_skipped(max_norm: MaxNorm, scaler: object, optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Clip within it: caps learn nothing if the scaler is going to skip the step because a gradient is inf.

    It is the same where a clipper is attached to the optimizer, whose step isn't called. Where caps learn, this waits
    for the device, as the scaler's ``step`` does right after.

    Args:
        max_norm: the caps.
        scaler: the ``GradScaler`` that has unscaled the gradients, or None.
        optimizers: the ones about to be stepped, wrapped or not.
    """
    policy = learner(max_norm)
    if policy is None or scaler is None or not any(_is_skipped(scaler, o) for o in optimizers):
        yield
        return
    before = policy.state_dict()
    try:
        yield
    finally:
        policy.load_state_dict(before)


def _is_skipped(scaler: Any, optimizer: Optimizer) -> bool:
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(innermost(optimizer)))
    if state is None or state["stage"].name != "UNSCALED":
        return False
    return any(found.item() for found in state["found_inf_per_device"].values())


# -----------------------------------------------------------------------------------------------------------
# Who else clips
# -----------------------------------------------------------------------------------------------------------

_warned: set[str] = set()


def warn_already_clipped(setting: str, value: object, effect: str) -> None:
    """Warns, once for each message, of a trainer's setting that clips as well; None, 0 and inf clip nothing."""
    message = f"{setting} {effect}"
    is_off = value is None or (isinstance(value, Real) and not 0 < float(value) < math.inf)
    if not is_off and message not in _warned:
        _warned.add(message)
        warn_caller(message)


def refuse_double_clipping(
    optimizers: Iterable[Optimizer], scaler: object, parameters: Sequence[Tensor], ours: str
) -> None:
    """Raises RuntimeError if another clipper of this package clips the same gradients: caps would learn twice.

    Args:
        optimizers: the trainer's, wrapped or not.
        scaler: the trainer's ``GradScaler``, or None.
        parameters: whose gradients are clipped here.
        ours: what clips them here, for the message.
    """
    if isinstance(scaler, ComponentClipGradScaler):
        raise RuntimeError(
            f"scaler: a ComponentClipGradScaler clips when it unscales, and {ours} would clip the same gradients "
            f"again; use torch.amp.GradScaler, or leave out {ours}"
        )
    for optimizer in optimizers:
        shared = clipping_too(optimizer, parameters)
        if shared:
            raise RuntimeError(
                f"optimizer: a clipper is attached to {type_name(optimizer)}, and would clip the gradient of "
                f"{shared[0][1]!r} again after {ours}; call remove() on what attach() returned, or leave out {ours}"
            )


# -----------------------------------------------------------------------------------------------------------
# FullyShardedDataParallel
# -----------------------------------------------------------------------------------------------------------


def without_whole_frozen(parameters: Parameters) -> tuple[Parameters, list[Tensor]]:
    """Leaves out frozen parameters that are whole beside sharded ones, as where FSDP wraps only some modules.

    Args:
        parameters: as for ``fused_component_clip_``, but no iterator, which would be used up.

    Returns:
        The others, or all as given if nothing is left out; and those left out. Should one of them be trained later,
        it can't be clipped together with the others.
    """
    named = named_tensors(parameters)
    left_out: list[Tensor] = []
    if any(map(is_flattened, named.tensors)):
        left_out = [p for p in named.tensors if not (p.requires_grad or is_flattened(p))]
    if not left_out:
        return parameters, []
    kept = [(n, p) for n, p in zip(named.names, named.tensors, strict=True) if p.requires_grad or is_flattened(p)]
    return kept if named.named else [p for _, p in kept], left_out


def group_of(parameters: NamedTensors, models: Sequence[nn.Module]) -> ProcessGroup | None:
    """The ranks over which ``FullyShardedDataParallel`` shards these parameters; None if it doesn't.

    Args:
        parameters: all that one call clips.
        models: the trainer's models, one of which shards them.

    Raises:
        ValueError: they aren't all sharded over the same ranks, or the ranks are unknown.
    """
    sharded = {id(t) for t in parameters.tensors if is_flattened(t)}
    if not sharded:
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy  # slow to import

    for name, tensor in zip(parameters.names, parameters.tensors, strict=True):
        if id(tensor) not in sharded:
            raise ValueError(
                f"parameters: {name!r} is whole on each rank, and others are sharded by FullyShardedDataParallel; "
                "wrap its module, too, or clip whole parameters in a call of their own"
            )
    owners = []
    for model in models:
        roots = FullyShardedDataParallel.fsdp_modules(model, root_only=True)
        own = [root for root in roots if not sharded.isdisjoint(map(id, root.parameters()))]
        if own:
            owners.append(own)
    if not owners:
        raise ValueError("parameters: no prepared model has them; pass process_group")
    if len(owners) > 1:
        raise ValueError(f"parameters: they belong to {len(owners)} prepared models; clip each in a call of its own")
    if any(root.sharding_strategy is ShardingStrategy.NO_SHARD for root in owners[0]):
        return None  # refused later, with what to use instead
    groups = {Group.of(root.process_group).ranks: root.process_group for root in owners[0]}
    if len(groups) > 1:
        raise ValueError(
            f"parameters: they are sharded over {len(groups)} different sets of ranks; clip each in a call of "
            "its own, with its process_group"
        )
    return next(iter(groups.values()))
