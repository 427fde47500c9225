"""What the remembered tensor would be now: a polynomial through those of the last full steps."""

import math
from collections.abc import Sequence

import torch


def forecast_weights(taken_at: Sequence[float], now: float) -> list[float]:
    """Weights of remembered values in the polynomial through them: w_i = prod over j != i of (x - x_j) / (x_i - x_j).

    Lagrange's form of the polynomial; Newton's divided differences are another form of the same. They sum to 1.

    Args:
        taken_at: The places x_i, all different, evenly spaced or not; n of them make a polynomial of degree n - 1.
        now: The place x.
    """
    return [math.prod((now - other) / (own - other) for other in taken_at if other != own) for own in taken_at]


def forecast(remembered: Sequence[tuple[float, torch.Tensor]], now: float) -> torch.Tensor:
    """Extrapolate the remembered tensors; a single one is held as it is, two make a line, three a parabola.

    Forecasting features instead of holding them is TaylorSeer's idea (arXiv 2503.06923), there for the outputs of every
    attention and MLP, here for one tensor. The weights come from the host, and nothing is read from the device.

    Args:
        remembered: Where each tensor was taken, and the tensor; one or more, all of one shape and dtype.
        now: Where the forecast is for.

    Returns:
        The forecast, summed in float32 (or wider) and rounded to the tensors' dtype once.
    """
    newest = remembered[-1][1]
    if len(remembered) == 1:
        return newest
    weights = forecast_weights([place for place, _ in remembered], now)
    total = torch.zeros_like(newest, dtype=torch.promote_types(newest.dtype, torch.float32))
    for weight, (_, features) in zip(weights, remembered, strict=True):
        total.add_(features, alpha=weight)
    return total.to(newest.dtype)
