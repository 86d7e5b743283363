"""Components of one tile in the Triton backend: how to switch their path off, and which kernels are launched."""

from types import SimpleNamespace

import torch

from cwclip_kernels.backends import triton, triton_step, triton_tables


def small_tiles(monkeypatch, elements):
    """A tile of the first pass has this many float32 elements, one of scaling four times as many."""
    monkeypatch.setattr(triton_tables, "SUM_TILE_BYTES", 4 * elements)
    monkeypatch.setattr(triton_tables, "SCALE_TILE_BYTES", 16 * elements)
    monkeypatch.setattr(triton_tables, "STEP_TILE_BYTES", 2 * elements)


def switch_off(monkeypatch):
    """No component is of one tile, as far as the tables know."""
    monkeypatch.setattr(
        triton_tables, "has_single_tile", lambda pieces, owner, count: torch.zeros(count, dtype=torch.bool)
    )


def record_launches(monkeypatch):
    """The kernels launched from now on, by name."""
    names, kernels = [], triton.kernels()

    class Named(SimpleNamespace):
        def __getitem__(self, grid):
            assert grid[0] > 0
            names.append(self.name)
            return self.kernel[grid]

    found = {n: Named(name=n, kernel=k) if n.endswith("_kernel") else k for n, k in vars(kernels).items()}
    for module in (triton, triton_step):
        monkeypatch.setattr(module, "kernels", lambda: SimpleNamespace(**found))
    return names


def lying_alike(t):
    """A copy in memory of its own, gaps and all."""
    memory = t.untyped_storage().clone()
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(memory, t.storage_offset(), t.shape, t.stride())
