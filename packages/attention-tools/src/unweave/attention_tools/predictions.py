"""What a model's output says of x = signal x0 + noise epsilon, for each kind of prediction."""

from __future__ import annotations

from torch import Tensor


def predicted_noise(x: Tensor, output: Tensor, signal: float, noise: float, kind: str) -> Tensor:
    """Return epsilon of x = signal x0 + noise epsilon, from what the model predicted."""
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return signal * output + noise * x
    return (x - signal * output) / noise


def predicted_image(x: Tensor, output: Tensor, signal: float, noise: float, kind: str) -> Tensor:
    """Return x0 of x = signal x0 + noise epsilon, from what the model predicted."""
    if kind == "epsilon":
        return (x - noise * output) / signal
    if kind == "v_prediction":
        return signal * x - noise * output
    return output


def scaled_noise(
    x: Tensor, output: Tensor, scale: Tensor, signal: float, noise: float, kind: str
) -> Tensor:
    """Return the output whose epsilon is `scale` (n,) times that of `output`.

    With epsilon = signal v + noise x and v = (epsilon - noise x) / signal this is
    c v + (c - 1) noise / signal x, and c x0 + (1 - c) / signal x for models of x0. Without signal
    epsilon is x itself, in all views, so there is nothing to scale.
    """
    c = scale.reshape(-1, 1, 1, 1).to(output)
    if kind == "epsilon":
        return c * output
    if signal == 0:
        return output
    if kind == "v_prediction":
        return c * output + (c - 1) * (noise / signal) * x
    return c * output + (1 - c) / signal * x
