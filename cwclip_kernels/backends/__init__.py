"""One module a backend, each with the same functions over one bucket.

    refuses(device, dtype, norm_type) -> str | None     why it can't serve such a gradient, None if it can
    power_sums(bucket, grads, norm_type) -> [K]         sum |g|^p (max for p = inf) of each component
    scale_(bucket, grads, coefs, zero_fill) -> None     g <- coef * g, nothing written where coef is 1
    clip_(bucket, grads, caps, rule, loss_scale) -> norms, coefs    both in one go, [K] each

``grads`` are plain strided tensors on ``bucket.device``, and ``bucket.pieces(grads)[i]`` is part of component
``bucket.components[i]``.
"""
