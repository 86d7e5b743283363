"""Triton device code and nothing else: what a program computes. Tables and launches are ``backends.triton`` and
``backends.triton_step``.

    power_sums.py   power_sums_kernel: one partial sum |g|^p for each tile
    combine.py      combine_kernel: partials to fewer partials, or to one sum for each component
    scale.py        scale_kernel: g <- coef * g; clip_kernel: the same, with coef from the partials
    adamw.py        coefficients_kernel, advance_kernel, adamw_kernel: AdamW's step from coef * g, which isn't written
    adamw_single.py adamw_single_kernel: all of it in one pass, for components of one tile
    tile.py         what the kernels share: how a program finds its elements and walks over them

Importing these modules imports Triton. ``TRITON_INTERPRET=1``, set before, runs them on CPU tensors.
"""
