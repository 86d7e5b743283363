"""ZeRO: each rank keeps and steps a part of the parameters. Norms are measured before parts are copied to float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ....distributed.partitions import Fragment
from .base import Flat, Steps, fragments_of, ranks_of, unknown


class Zero12(Flat):
    """ZeRO stages 1 and 2: each rank has a contiguous part of each param group."""

    needs = (
        *("round_robin_bit16_groups", "real_dp_process_group", "params_in_partition", "averaged_gradients"),
        *("single_partition_of_fp32_groups", "cpu_offload", "loss_scale", "_global_grad_norm"),
    )
    looks_first = property(lambda self: getattr(self.optimizer, "check_grad_overflow", True))
    calls = (("scaled_global_norm", ("norm_type",)), ("unscale_and_clip_grads", ("grad_groups_flat", "total_norm")))

    def _fragments(self) -> Iterator[tuple[Tensor, Fragment]]:
        """Not by DeepSpeed's own mapping, which is wrong where ``round_robin_gradients`` has another order."""
        groups, flats = self.optimizer.round_robin_bit16_groups, self.optimizer.single_partition_of_fp32_groups
        paddings = getattr(self.optimizer, "round_robin_bit16_padding", None)
        return fragments_of(groups, flats, self.optimizer.real_dp_process_group, paddings)

    def _flat_gradient(self, partition: int) -> Tensor | None:
        return self.optimizer.single_partition_of_fp32_groups[partition].grad  # type: ignore[no-any-return]

    def _flat_values(self, partition: int) -> Tensor:
        return self.optimizer.single_partition_of_fp32_groups[partition]  # type: ignore[no-any-return]

    def gradients(self) -> list[Tensor | None]:
        """Of an optimizer that is offloaded the copies there; otherwise what was reduced, in its dtype."""
        if self.optimizer.cpu_offload:
            return super().gradients()
        reduced: dict[int, Tensor] = {}
        for i, parameters in enumerate(self.optimizer.params_in_partition):
            # One gradient for each parameter with elements here, and padding, which isn't marked if it is the last.
            parts = [g for g in self.optimizer.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
            own = [p for p in parameters if p.numel()]
            for parameter, part in zip(own, (g for g in parts if g.numel()), strict=False):
                reduced[id(parameter)] = part.reshape(-1)
        found: list[Tensor | None] = []
        for parameter, fragment in zip(self.named.tensors, self.fragments, strict=True):
            part = reduced.get(id(parameter))
            if fragment is not None and (0 if part is None else part.numel()) != fragment.numel:
                raise RuntimeError(unknown(self.optimizer, "averaged_gradients aren't those of params_in_partition"))
            found.append(part)
        return found

    def install(self, steps: Steps) -> None:
        """See ``EngineOptimizer``."""
        optimizer = self.optimizer

        def scaled_global_norm(norm_type: float = 2) -> Tensor:
            scale = float(optimizer.loss_scale)
            total = steps.measure(scale) * scale
            if not steps.knows_total:
                return type(optimizer).scaled_global_norm(optimizer, norm_type)  # type: ignore[no-any-return]
            return torch.where(total.isfinite(), total.float(), torch.inf)

        def unscale_and_clip_grads(grad_groups_flat: list[Tensor], total_norm: object) -> None:
            for gradient in grad_groups_flat:
                owners = enumerate(optimizer.single_partition_of_fp32_groups)
                partition = next((i for i, flat in owners if flat.grad is gradient), None)
                if partition is None:
                    raise RuntimeError(
                        unknown(optimizer, "unscale_and_clip_grads isn't given a partition's gradient")
                    )
                steps.scale_(partition, gradient)

        self._replace("scaled_global_norm", scaled_global_norm)
        self._replace("unscale_and_clip_grads", unscale_and_clip_grads)


class Zero3(Flat):
    """ZeRO stage 3: each rank has a part of each parameter; parts lie end to end in sub-groups."""

    needs = (
        *("fp16_groups", "fp32_partitioned_groups_flat", "dp_process_group", "offload_optimizer", "dtype"),
        *("loss_scale", "_global_grad_norm"),
    )
    looks_first = property(lambda self: self.optimizer.dtype == torch.float16)
    calls = (("_get_norm_groups", ()), ("unscale_and_clip_grads", ("sub_group_id", "total_norm")))

    def _fragments(self) -> Iterator[tuple[Tensor, Fragment]]:
        for i, group in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                process_group = getattr(parameter, "ds_process_group", self.optimizer.dp_process_group)
                size = parameter.partition_numel()
                start = min(torch.distributed.get_rank(process_group) * size, parameter.ds_numel)
                numel = min(size, parameter.ds_numel - start)  # the last parts may be padded
                yield parameter, Fragment(start, numel, i, offset, ranks_of(process_group))
                offset += size

    def _flat_gradient(self, partition: int) -> Tensor | None:
        return self.optimizer.fp32_partitioned_groups_flat[partition].grad  # type: ignore[no-any-return]

    def _flat_values(self, partition: int) -> Tensor:
        return self.optimizer.fp32_partitioned_groups_flat[partition]  # type: ignore[no-any-return]

    def gradients(self) -> list[Tensor | None]:
        """Of an optimizer that is offloaded the copies there; otherwise what was reduced, in its dtype."""
        if self.optimizer.offload_optimizer:
            return super().gradients()
        reduced = {
            id(parameter): part
            for i, group in enumerate(self.optimizer.fp16_groups)
            for parameter, part in zip(group, self.optimizer.averaged_gradients[i], strict=True)
        }
        return [
            None if fragment is None else reduced[id(parameter)].narrow(0, 0, fragment.numel)
            for parameter, fragment in zip(self.named.tensors, self.fragments, strict=True)
        ]

    def install(self, steps: Steps) -> None:
        """See ``EngineOptimizer``."""
        optimizer, scale = self.optimizer, 1.0

        def _get_norm_groups() -> list[Tensor]:
            nonlocal scale
            scale = float(optimizer.loss_scale)
            total = steps.measure(scale) * scale
            if not steps.knows_total:
                return type(optimizer)._get_norm_groups(optimizer)  # type: ignore[no-any-return]
            return [total]

        def unscale_and_clip_grads(sub_group_id: int, total_norm: Any) -> None:
            if not steps.knows_total:  # divided by the loss scale of the next step
                self.report(total_norm / scale)
            steps.scale_(sub_group_id, optimizer.fp32_partitioned_groups_flat[sub_group_id].grad)

        self._replace("_get_norm_groups", _get_norm_groups)
        self._replace("unscale_and_clip_grads", unscale_and_clip_grads)
