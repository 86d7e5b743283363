"""Triton device code and nothing else: what a program computes. Tables and launches are ``backends.triton`` and
``backends.triton_step``.

    power_sums.py   power_sums_kernel: one partial sum |g|^p for each tile
    combine.py      combine_kernel: partials to fewer partials, or to one sum for each component
    coefficients.py coefficients_kernel: partials to norm, coefficient and factor of each component
    scale.py        scale_kernel: g <- factor * g
    clip.py         sum_or_clip_kernel: power_sums_kernel that also clips, at once, components of one tile
    adamw.py        advance_kernel, adamw_kernel: AdamW's step from factor * g, which isn't written
    adamw_single.py adamw_single_kernel: norm, coefficient and step in one pass, for components of one tile
    tile.py         what the kernels share: how a program finds its elements and walks over them

Importing these modules imports Triton. ``TRITON_INTERPRET=1``, set before, runs them on CPU tensors.
"""
