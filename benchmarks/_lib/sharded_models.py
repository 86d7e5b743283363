"""Parameter lists as in sharded training: DTensors with gradients, one shard per rank.

No model is built: clipping depends on names, shapes, meshes and placements alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from .shapes import ShapeSet, narrow_llama3_8b, narrow_qwen3_30b_a3b

Layout = tuple[DeviceMesh, tuple[Placement, ...]]


@dataclass(frozen=True)
class Case:
    """One model on one choice of meshes.

    Attributes:
        key: names it in the results.
        description: for people.
        shape_set: names and shapes.
        meshes: made by all ranks together.
        layout: of a parameter, by its name and ``meshes``.
        has_experts: stacked along dim 0 of "*.experts.*".
    """

    key: str
    description: str
    shape_set: ShapeSet
    meshes: Callable[[], Sequence[DeviceMesh]]
    layout: Callable[[str, Sequence[DeviceMesh]], Layout]
    has_experts: bool = False


def cases(ranks: int, layers: int | None = None, by: int = 32) -> list[Case]:
    """What is measured.

    Args:
        ranks: an even number.
        layers: fewer than the models have.
        by: what widths are divided by.
    """
    llama, moe = narrow_llama3_8b(layers or 32, by), narrow_qwen3_30b_a3b(layers or 48, by)
    one, two, ep = f"{ranks} ranks", f"dp {ranks // 2} x tp 2", f"efsdp 2 x ep {ranks // 2}"
    grid = (ranks // 2, 2)
    return [
        Case(
            "llama, fsdp",
            f"{llama.description}: FSDP2 over {one}",
            llama,
            lambda: [_mesh((ranks,), "dp")],
            lambda name, meshes: (meshes[0], (Shard(0),)),
        ),
        Case(
            "llama, fsdp x tp",
            f"{llama.description}: FSDP2 over tensor parallelism, {two}",
            llama,
            lambda: [_mesh(grid, "dp", "tp")],
            lambda name, meshes: (meshes[0], _over_tensor_parallel(name, 2)),
        ),
        # torch logs that it would send less if somebody flattened the mesh; so somebody does.
        Case(
            "llama, fsdp x tp, flattened",
            f"{llama.description}: the same, after mesh._flatten()",
            llama,
            lambda: [_flattened(_mesh(grid, "fsdp", "tensor"))],
            lambda name, meshes: (meshes[0], _over_tensor_parallel(name, 2)),
        ),
        Case(
            "moe, fsdp and ep",
            f"{moe.description}: FSDP2 over {one}, experts over {ep}",
            moe,
            lambda: [_mesh((ranks,), "dp"), _mesh((2, ranks // 2), "efsdp", "ep")],
            lambda name, meshes: (
                (meshes[1], (_StridedShard(0, split_factor=ranks // 2), Shard(0)))
                if ".experts." in name
                else (meshes[0], (Shard(0),))
            ),
            has_experts=True,
        ),
    ]


def _mesh(shape: tuple[int, ...], *names: str) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _flattened(mesh: DeviceMesh) -> DeviceMesh:
    mesh._flatten()
    return mesh


_ROWWISE = ("o_proj.weight", "down_proj.weight")


def _over_tensor_parallel(name: str, tp: int) -> tuple[Placement, ...]:
    """What FSDP2 makes of torchtitan's plan: norms replicated, o and down by columns, all else by rows."""
    if "norm" in name:
        return Shard(0), Replicate()
    if name.endswith(_ROWWISE):
        return Shard(0), Shard(1)
    return _StridedShard(0, split_factor=tp), Shard(0)


class ShardedGradients:
    """A case's parameters on this rank, with gradients that hold other random numbers after each ``refill``.

    As FSDP2 leaves them, gradients are views of few buffers and share their DTensor's spec with the parameter. The
    parameters are one element each, expanded: clipping doesn't read them. What is replicated is the same on all
    replicas.

    Attributes:
        named: (name, parameter).
        local: what is here of each gradient.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        meshes = case.meshes()
        layouts = [case.layout(name, meshes) for name, _ in case.shape_set.shapes]
        local_shapes = [
            _local_shape(shape, *layout) for (_, shape), layout in zip(case.shape_set.shapes, layouts, strict=True)
        ]
        keys = [(mesh.mesh_dim_names, placements) for mesh, placements in layouts]
        sizes = dict.fromkeys(keys, 0)
        for key, shape in zip(keys, local_shapes, strict=True):
            sizes[key] += math.prod(shape)
        self._buffers = [torch.empty(size) for size in sizes.values()]
        self._generators = [torch.Generator() for _ in sizes]
        self._seeds = [
            hash((seed, i, _held(*layouts[keys.index(key)]))) % 2**31 for i, key in enumerate(sizes)
        ]  # of small ints alone: the same in every process
        rest = dict(zip(sizes, self._buffers, strict=True))
        self.named: list[tuple[str, nn.Parameter]] = []
        self.local: list[Tensor] = []
        for (name, shape), layout, local, key in zip(case.shape_set.shapes, layouts, local_shapes, keys, strict=True):
            numel = math.prod(local)
            grad, rest[key] = rest[key][:numel].view(local), rest[key][numel:]
            self.local.append(grad)
            self.named.append((name, _parameter(shape, local, layout, grad)))
        self.reseed()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named]

    def reseed(self) -> None:
        """From the first random numbers again."""
        for generator, seed in zip(self._generators, self._seeds, strict=True):
            generator.manual_seed(seed)
        self.refill()

    def refill(self) -> None:
        """The next random numbers."""
        for buffer, generator in zip(self._buffers, self._generators, strict=True):
            buffer.normal_(generator=generator)


def _local_shape(shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, ...]:
    local = list(shape)
    for size, placement in zip(mesh.shape, placements, strict=True):
        if not placement.is_replicate():
            dim = placement.dim  # type: ignore[attr-defined]
            if local[dim] % size:
                raise ValueError(
                    f"{shape} over {mesh}: {size} ranks can't share dim {dim} evenly; other --by or --ranks"
                )
            local[dim] //= size
    return tuple(local)


def _held(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, ...]:
    """This rank's place, the same on replicas."""
    coordinate = mesh.get_coordinate() or ()
    return tuple(0 if p.is_replicate() else c for p, c in zip(placements, coordinate, strict=True))


def _parameter(shape: tuple[int, ...], local: tuple[int, ...], layout: Layout, grad: Tensor) -> nn.Parameter:
    stride = torch.empty(shape, device="meta").stride()
    value = DTensor.from_local(torch.zeros(()).expand(local), *layout, run_check=False, shape=shape, stride=stride)
    parameter = nn.Parameter(value)
    parameter.grad = DTensor(grad, parameter._spec, requires_grad=False)  # type: ignore[attr-defined]
    return parameter
