"""Positive numbers, by their logarithm."""

from torch import Tensor, nn

from metakd.errors import MetaKDError


class Positive(nn.Module):
    """Positive numbers, `exp(free)`: a step of an optimizer multiplies them by a factor.

    For quantities that span orders of magnitude: variances, learning rates, decays. For weights near one, prefer the
    weight models' output map `"softplus"`.

    Shapes: any, elementwise.

    Raises:
        MetaKDError: `right_inverse` of a number that is not positive and finite.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 0.5)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
        >>> layer.weight, layer.parametrizations.weight.original
        (tensor([[0.5000, 0.5000]], grad_fn=<ExpBackward0>), Parameter containing:
        tensor([[-0.6931, -0.6931]], requires_grad=True))
    """

    def forward(self, free: Tensor) -> Tensor:
        """Return the positive numbers, the shape of `free`."""
        return free.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the free numbers that `forward` maps to `value`, same shape."""
        if not bool(((value > 0) & value.isfinite()).all()):
            raise MetaKDError(
                f"Positive cannot start at a tensor whose smallest entry is {value.min().item():g} and largest "
                f"{value.max().item():g}: all must be positive and finite; use .clamp(min=...)"
            )
        return value.log()
