"""Optimizers for bfloat16 and float16 without ZeRO: each rank has whole gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ....arguments import type_name
from ....components.spec import Grouping
from ....core.optimizers import check_runs_hooks
from ....core.options import Options
from ....core.parameter_clipper import ParameterClipper
from ....core.session import ClipSession
from ....distributed.partitions import Fragment
from ....thresholds.constant import MaxNorm
from .base import EngineOptimizer, Flat, Steps, check_in_module, fragments_of, unknown


class Bf16(Flat):
    """bfloat16 with float32 accumulation (``BF16_Optimizer``): states are partitioned, gradients are not."""

    needs = (
        *(
            "bf16_groups",
            "real_dp_process_group",
            "fp32_groups_flat_partition",
            "fp32_groups_gradient_flat_partition",
        ),
        *("optimizer", "clip_grad"),
    )
    calls = (("get_grads_for_norm", ("for_clipping",)),)

    def _fragments(self) -> Iterator[tuple[Tensor, Fragment]]:
        flats, process_groups = self.optimizer.fp32_groups_flat_partition, self.optimizer.real_dp_process_group
        return fragments_of(self.optimizer.bf16_groups, flats, process_groups)

    def _flat_gradient(self, partition: int) -> Tensor:
        return self.optimizer.fp32_groups_gradient_flat_partition[partition]  # type: ignore[no-any-return]

    def _flat_values(self, partition: int) -> Tensor:
        return self.optimizer.fp32_groups_flat_partition[partition]  # type: ignore[no-any-return]

    def install(self, steps: Steps) -> None:
        """See ``EngineOptimizer``. The step measures what ``get_grads_for_norm`` returns: of one number, itself."""
        optimizer = self.optimizer
        check_runs_hooks(optimizer.optimizer)

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            if for_clipping:
                raise RuntimeError(
                    f"engine: clip_grad of its {type_name(optimizer)} is {optimizer.clip_grad!r}; set it to 0"
                )
            total = steps.measure(1.0)
            if not steps.knows_total:
                return type(optimizer).get_grads_for_norm(optimizer)
            return [total.reshape(1)], {}

        def before_step(inner: Optimizer, *_: object) -> None:
            if steps.is_measured:  # not if others step it, by hand
                for i, flat in enumerate(optimizer.fp32_groups_flat_partition):
                    steps.scale_(i, flat.grad)

        self._replace("get_grads_for_norm", get_grads_for_norm)
        self._hooks.append(optimizer.optimizer.register_step_pre_hook(before_step))


class Fused16(Flat):
    """Whole gradients on each rank, laid flat by param group (``FP16_Optimizer``, stage 0)."""

    looks_first = True
    needs = ("fp16_groups", "fp32_groups_flat", "_global_grad_norm")
    calls = (
        ("_update_scale", ("skip",)),
        ("unscale_and_clip_grads", ("grad_groups_flat", "total_norm", "apply_scale")),
    )

    def _fragments(self) -> Iterator[tuple[Tensor, Fragment]]:
        for i, group in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                yield parameter, Fragment(0, parameter.numel(), i, offset)
                offset += parameter.numel()

    def _flat_gradient(self, partition: int) -> Tensor | None:
        return self.optimizer.fp32_groups_flat[partition].grad  # type: ignore[no-any-return]

    def _flat_values(self, partition: int) -> Tensor:
        return self.optimizer.fp32_groups_flat[partition]  # type: ignore[no-any-return]

    def install(self, steps: Steps) -> None:
        """See ``EngineOptimizer``."""
        scale_before_update = _remembered_scale(self)

        def unscale_and_clip_grads(
            grad_groups_flat: list[Tensor], total_norm: object, apply_scale: bool = True
        ) -> None:
            steps.measure(scale_before_update())
            for i, gradient in enumerate(grad_groups_flat):
                steps.scale_(i, gradient)

        self._replace("unscale_and_clip_grads", unscale_and_clip_grads)


class Unfused16(EngineOptimizer):
    """Whole gradients on each rank, one for each parameter (``FP16_UnfusedOptimizer``, stage 0)."""

    looks_first = True
    needs = ("fp16_groups", "fp32_groups", "_global_grad_norm")
    calls = (("_update_scale", ("skip",)), ("unscale_and_clip_grads", ("total_norm", "apply_scale")))

    def clipper(self, max_norm: MaxNorm, options: Options, components: Grouping) -> ParameterClipper:
        """Of the float32 copies that the optimizer steps."""
        check_in_module([p for group in self.optimizer.fp16_groups for p in group], self.named)
        own = {
            id(p): copy
            for group, copies in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
            for p, copy in zip(group, copies, strict=True)
        }
        tensors = tuple(own.get(id(p), p.detach()) for p in self.named.tensors)
        session = ClipSession.of(
            replace(self.named, tensors=tensors), components, None, None, options.in_words(max_norm)
        )
        clipped = session.components.clipped
        named = zip(self.named.tensors, tensors, strict=True)
        self._left_out = [copy for i, (p, copy) in enumerate(named) if id(p) in own and i not in clipped]
        return ParameterClipper(tensors, session, max_norm, options)

    def install(self, steps: Steps) -> None:
        """See ``EngineOptimizer``."""
        scale_before_update = _remembered_scale(self)

        def unscale_and_clip_grads(total_norm: object, apply_scale: bool = True) -> None:
            scale = scale_before_update()
            steps.clip_(scale)
            for copy in self._left_out:
                if copy.grad is not None and scale != 1.0:
                    copy.grad.mul_(1.0 / scale)

        self._replace("unscale_and_clip_grads", unscale_and_clip_grads)


def loss_scaling(optimizer: Any) -> Any:
    """What has the loss scale of one of these, ``cur_scale``: until 0.18.5 the optimizer itself."""
    return getattr(optimizer, "loss_scale_config", optimizer)


def _remembered_scale(owner: EngineOptimizer) -> Callable[[], float]:
    """The loss scale of the gradients of this step; the step updates it before they are unscaled."""
    optimizer = owner.optimizer
    keeper = loss_scaling(optimizer)
    if not hasattr(keeper, "cur_scale"):
        raise RuntimeError(unknown(optimizer, "it has no 'cur_scale'"))
    scale = [1.0]

    def _update_scale(skip: bool) -> None:
        scale[0] = float(keeper.cur_scale)
        type(optimizer)._update_scale(optimizer, skip)

    owner._replace("_update_scale", _update_scale)
    return lambda: scale[0]
