"""TorchOpt's transformations with the errors of TorchOpt 0.7.3 fixed."""

import inspect

from metakd.inner.transformation import GradientTransformation, require_torchopt


def repaired(transformation: GradientTransformation) -> GradientTransformation:
    """Fix the errors of TorchOpt 0.7.3 in a transformation; states keep their layout.

    Fixes `trace` (a closure, not the state, knew whether a buffer had started), `scale_by_adam` (bias correction in
    float32, NaN derivatives at zero gradients, the approximate fused operator), `scale_by_rms`, `scale_by_stddev`,
    `scale_by_rss` and `scale_by_radam` (NaN derivatives at zero gradients) and `clip_grad_norm` (autograd treated the
    clip factor as a constant), anywhere in a chain. RMSprop, Adagrad and RAdam are made of these. A gradient of None
    gives no update. In these transformations it leaves the state unchanged; for the state of all others it counts as
    zero.

    Args:
        transformation: TorchOpt's, or a chain of them.

    Returns:
        The repaired transformation; one that needs no repair is returned unchanged.

    Examples:
        >>> import torch, torchopt
        >>> from metakd.inner import apply
        >>> adam = repaired(torchopt.adam(lr=0.1))
        >>> theta = {"w": torch.zeros(2, dtype=torch.float64)}
        >>> g = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> new, _ = apply(adam, {"w": g}, adam.init(theta), theta)
        >>> torch.autograd.grad(new["w"].sum(), g)[0].isfinite().all()
        tensor(True)
    """
    if getattr(transformation.update, "_metakd_own", False) or not inspect.isfunction(transformation.update):
        return transformation
    require_torchopt("a transformation without the mark of metakd.inner.own")
    from metakd.inner.mended import mended

    return mended(transformation)


def own(transformation: GradientTransformation) -> GradientTransformation:
    """Mark a transformation as correct: it needs no repair and handles gradients of None.

    Args:
        transformation: your own; for a parameter without a gradient `update` gets None and returns None.

    Returns:
        The same transformation.

    Examples:
        >>> def update(gradients, state, *, params=None, inplace=True):
        ...     return {name: None if g is None else -0.1 * g.sign() for name, g in gradients.items()}, state
        >>> signs = own(GradientTransformation(lambda params: (), update))
        >>> repaired(signs) is signs
        True
    """
    transformation.update._metakd_own = True  # type: ignore[attr-defined]
    return transformation


def scales(transformation: GradientTransformation) -> GradientTransformation:
    """Mark a transformation as `own`, and as one without state that multiplies each gradient by a number.

    Such an update is its own transpose, so that cotangents need no graph to pass back through it.
    """
    transformation.update._metakd_scales = True  # type: ignore[attr-defined]
    return own(transformation)


def only_scales(transformation: GradientTransformation) -> bool:
    """Whether it has the mark of `scales`."""
    return getattr(transformation.update, "_metakd_scales", False)
