"""``attach``: clipping by component in the steps of a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...clipper import ComponentClipper
from ...components.parameters import named_tensors
from ...core.loss_scale import UNSCALED, LossScale
from ...core.options import ClipOptions
from ...core.parameter_clipper import ParameterClipper
from ...core.partitioned_clipper import PartitionedClipper
from ...handle import Handle
from ...result import ClipResult
from ...thresholds.constant import MaxNorm
from .._common import Given, checked, clipper_arguments, learner
from .internals.base import EngineOptimizer
from .internals.checkpoints import Checkpoints
from .internals.engine import check_engine, optimizer_of, parameters_of
from .internals.experts import check_experts
from .internals.own_clipping import OwnClipping

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def attach(
    engine: DeepSpeedEngine,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    on_clip: Callable[[ClipResult], object] | None = None,
    **options: Unpack[ClipOptions],
) -> EngineClipping:
    """Clips each component's gradient by its own norm at every ``engine.step()`` that updates parameters.

    Norms are those of whole parameters and of averaged gradients without the loss scale, wherever ZeRO's partitions
    cut them. They take one all-reduce of K numbers; nothing is gathered, and no gradient is copied beside what
    DeepSpeed copies. Gradients are multiplied once, by coefficient over loss scale. All ranks call this together,
    after ``deepspeed.initialize`` and before the first step.

    ``engine.get_global_grad_norm()`` goes on to return the norm of all gradients before clipping. Steps that
    DeepSpeed skips because of inf or NaN are skipped as before, whatever ``nonfinite`` says, and caps learn nothing
    from them. It steps all the same, so that ``nonfinite`` decides, in stage 0 with fp32, and in stages 1 and 2 with
    ``"bf16": {"check_grad_overflow": false}``. Gradient accumulation, several param groups, an optimizer offloaded
    to the CPU and experts in ZeRO stages 1 and 2 need no argument.

    Args:
        engine: what ``deepspeed.initialize`` returned, with ``"gradient_clipping": 0`` in its configuration, since
            some versions clip to 1.0 otherwise.
        max_norm: as for ``ComponentClipper``. Checkpoints of the engine carry what a threshold learns.
        norm_type: as for ``ComponentClipper``.
        error_if_nonfinite: as for ``ComponentClipper``, where DeepSpeed doesn't skip the step before.
        on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``.
        options: ``components``, ``eps``, ``nonfinite`` and ``backend`` of ``ComponentClipper``. Names are those of
            ``engine.module``. A ``ComponentSpec`` can cut parameters along dim 0.

    Returns:
        A handle: ``remove()`` ends clipping, ``last`` is the last ``ClipResult``.

    Raises:
        TypeError, ValueError: a wrong argument.
        RuntimeError: the engine's gradients can't be clipped by component, and why; or DeepSpeed isn't as in the
            versions that this was tried with. Nothing is changed.

    Example:
        >>> import torch, deepspeed                                               # doctest: +SKIP
        >>> from cwclip_kernels.integrations.deepspeed import attach
        >>> config = {"train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": True}, "gradient_clipping": 0,
        ...           "zero_optimization": {"stage": 2}}
        >>> optimizer = torch.optim.AdamW(model.parameters())                     # doctest: +SKIP
        >>> engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)  # doctest: +SKIP
        >>> clipping = attach(engine, max_norm=0.05)                              # doctest: +SKIP
        >>> for batch in loader:                                                  # doctest: +SKIP
        ...     engine.backward(engine(**batch).loss)
        ...     engine.step()
    """
    return EngineClipping(engine, max_norm, clipper_arguments(norm_type, error_if_nonfinite, options), on_clip)


class EngineClipping(Handle):
    """Clipping at work in a DeepSpeed engine; made by ``attach``. As a context manager it ends itself.

    For trainers, ``replaces_clipping`` says that the ``gradient_clipping`` of the engine's configuration is nothing
    that its user wrote, and ends here; and ``in_checkpoints=False`` that the trainer saves what caps learn.

    Attributes:
        names: the K component names.
        last: what the last step's clipping found and did; None before the first.
    """

    _not_copied = "an EngineClipping of one engine can't be copied or pickled: attach to the other engine"

    def __init__(
        self,
        engine: Any,
        max_norm: MaxNorm,
        arguments: dict[str, Any],  # as ``clipper_arguments`` returns them
        on_clip: Callable[[ClipResult], object] | None,
        *,
        replaces_clipping: bool = False,
        in_checkpoints: bool = True,
    ) -> None:
        options = dict(arguments)
        scalars = checked(options.pop("norm_type"), options.pop("error_if_nonfinite"), cast(ClipOptions, options))
        if options.get("process_group") is not None:
            raise ValueError("process_group: DeepSpeed knows which ranks share a parameter; leave it out")
        check_engine(engine, replaces_clipping)
        if attached_to(engine) is not None:
            raise RuntimeError("engine: clipping is attached to it already; call remove() on that first")
        self._engine, self._max_norm, self._on_clip = engine, max_norm, on_clip
        self._given = Given(max_norm, arguments)
        self._measured: ClipResult | None = None  # and not yet scaled
        self._is_telling = False  # within on_clip
        named = named_tensors(engine.module)
        self._optimizer: EngineOptimizer | None = optimizer_of(engine, named)
        if scalars.raise_nonfinite and self._optimizer is not None and self._optimizer.looks_first:
            raise ValueError(
                "nonfinite: 'error' (error_if_nonfinite=True) would never be one here: DeepSpeed looks for inf and "
                "NaN before, and skips the step; use 'propagate', 'zero' or 'skip' (under ZeRO 1 and 2 with "
                'bf16 also: "bf16": {"check_grad_overflow": false})'
            )
        self._attachment: Handle | None = None
        self._own_clipping: OwnClipping | None = None
        grouping = options.get("components")
        self._clipper: ParameterClipper
        if self._optimizer is None:
            clipper = ComponentClipper(engine.module, max_norm, **arguments)
            self._clipper = clipper
        else:
            self._clipper = self._optimizer.clipper(max_norm, scalars, grouping)
        self.names = self._clipper.names
        has_experts = check_experts(named, self._clipper, learner(max_norm) is not None)
        if isinstance(self._clipper, PartitionedClipper):
            covers_all = self._clipper.covers_all
        else:
            clipped = {id(named.tensors[position]) for position, _, _ in self._clipper.members}
            covers_all = clipped.issuperset(map(id, parameters_of(engine)))
        self.knows_total = scalars.rule.norm_type == 2.0 and not has_experts and covers_all
        saving = (self.state_dict, self.load_state_dict) if in_checkpoints else ()
        self._checkpoints = Checkpoints(engine, *saving)
        try:
            if self._optimizer is None:
                self._attachment = clipper.attach(engine.optimizer, on_clip=self._has_clipped)
            else:
                self._optimizer.install(self)
            self._own_clipping = OwnClipping(engine)
        except Exception:
            self.remove()
            raise
        setattr(engine, _ATTRIBUTE, self)

    def remove(self) -> None:
        """Ends clipping, and leaves the engine as it was. RuntimeError within ``on_clip``, amid a step."""
        if self._is_telling:
            raise RuntimeError("remove(): on_clip is called while gradients are clipped; call it after engine.step()")
        self._checkpoints.remove()
        if self._own_clipping is not None:
            self._own_clipping.restore()
        if self._attachment is not None:
            self._attachment.remove()
            self._engine._global_grad_norm = None  # of which DeepSpeed itself knows nothing here
        if self._optimizer is not None:
            self._optimizer.remove()
        vars(self._engine).pop(_ATTRIBUTE, None)

    def explain(self) -> str:
        """Which backend measures what this rank holds, and which all-reduces a step takes, for people to read."""
        return self._clipper.explain()

    def other_argument(self, max_norm: MaxNorm, arguments: dict[str, Any]) -> str | None:
        """The first argument that isn't the one that was attached, of those that ``clipper_arguments`` returns."""
        return self._given.other_than(max_norm, arguments)

    def total_norm(self, norms: Tensor) -> Tensor:
        """The norm of all components together: []."""
        return self._clipper.total_norm(norms)

    def global_norm(self) -> Tensor | None:
        """[] the norm of all gradients at the last step, as the engine reports it; None before the first."""
        norm = self._engine.get_global_grad_norm()
        if norm is not None:
            return torch.as_tensor(norm)
        return None if self.last is None else self.total_norm(self.last.norms)

    # What the step of DeepSpeed's optimizer calls: see ``internals.base.Steps``.

    @property
    def is_measured(self) -> bool:
        """Whether norms have been measured and gradients not yet scaled."""
        return self._measured is not None

    @torch.no_grad()
    def measure(self, loss_scale: float) -> Tensor:
        """Measures the gradients of this step; the norm of all together, []."""
        assert isinstance(self._clipper, PartitionedClipper)
        self._measured = None
        self._measured = self._clipper.measure(_unscaling(loss_scale))
        return self._clipper.total_norm(self._measured.norms)

    def scale_(self, partition: int, gradient: Tensor) -> None:
        """Unscales and clips a partition's gradient; the first of a step tells that it isn't skipped."""
        assert isinstance(self._clipper, PartitionedClipper)
        if self._measured is not None:
            result, self._measured = self._measured, None
            self._clipper.learn(result)
            self._has_clipped(result)
        self._clipper.scale_(partition, gradient)

    def clip_(self, loss_scale: float) -> None:
        """Measures, unscales and clips in one pass."""
        self._has_clipped(self._clipper.clip(_unscaling(loss_scale)))

    def _has_clipped(self, result: ClipResult) -> None:
        self.last = result
        if self.knows_total:
            total = self._clipper.total_norm(result.norms)
            if self._optimizer is None:
                self._engine._global_grad_norm = total
            else:
                self._optimizer.report(total)
        if self._on_clip is not None:
            self._is_telling = True
            try:
                self._on_clip(result)
            finally:
                self._is_telling = False


def _unscaling(loss_scale: float) -> LossScale:
    return UNSCALED if loss_scale == 1.0 else LossScale(1.0 / loss_scale)


def attached_to(engine: object) -> EngineClipping | None:
    """What clips in an engine; None if nothing is attached."""
    found = vars(engine).get(_ATTRIBUTE)
    return found if isinstance(found, EngineClipping) else None


_ATTRIBUTE = "_cwclip_clipping"  # of the engine: what is attached to it
