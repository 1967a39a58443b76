"""`OneStep`: the exact hypergradient of one inner step, without a second-order graph."""

from collections.abc import Sequence
from dataclasses import dataclass

from metakd.errors import MetaKDError
from metakd.estimators.mixed import Mode, mixed_alone
from metakd.estimators.problem import Problem
from metakd.estimators.result import Hypergradient
from metakd.estimators.second_order import reverse_over_reverse
from metakd.estimators.subset import moving_only
from metakd.estimators.walk import walk_back


@dataclass(frozen=True)
class OneStep:
    r"""Exact hypergradient of K = 1 inner step.

    With $g = \nabla_\theta\, \mathrm{inner}(\theta, \phi)$, $\theta' = \theta + \mathrm{update}(g)$,
    $v = \nabla\, \mathrm{outer}(\theta')$ and $u = (\partial\, \mathrm{update} / \partial g)^\top v$,

    $$\frac{d\, \mathrm{outer}}{d \phi} = \nabla_\phi \big[ D_\theta\, \mathrm{inner}(\theta, \phi)[u] \big]
      + \frac{\partial\, \mathrm{outer}}{\partial \phi}.$$

    In forward mode the directional derivative $D_\theta$ is one forward pass with dual numbers. It serves all samples
    and all terms at once, and reverse mode then runs through the weight model only. Reverse mode is a double backward.
    For a weighted mean of losses, such as a balancer's, `"auto"` is forward mode; it warns once and changes to reverse
    mode if the model lacks forward-mode formulas or torch's are wrong. For any other inner loss it is reverse mode: if
    $\phi$ acts before an operation such as layer_norm, torch's forward-mode result is a constant to reverse mode, and
    the answer would be silently wrong. Meta-Weight-Net (Shu et al., 2019) and BiKD (arXiv 2605.17839) compute the same
    quantity by double backward through a copy of the student.

    With `parameters` the lookahead moves only those, as in AMAL (Sivasubramanian et al., 2023), which moves the
    classifier and the last stage. The answer is exact for that step and an approximation for the whole one. All three
    passes stop, or start, at the first moving layer: see [quick ways](cost.md#quick-ways) for costs and errors.

    Args:
        mode: `"auto"`, `"forward"` or `"reverse"`. For an inner loss that is no weighted mean, `"forward"` is compared
            with `"reverse"`, unless `hypergradient(verify=False)` forbids it.
        parameters: the parameters that the step moves, as patterns over their names, such as `("classifier.*",
            "blocks.2.*")`; dots join the levels of nested dicts. None for all.

    Raises:
        MetaKDError: when called with K other than 1, with a pattern that fits no trainable parameter, or in forward
            mode on a model whose forward-mode formulas are missing or wrong.

    Examples:
        >>> import torch, torchopt
        >>> from metakd import hypergradient
        >>> w, phi = {"w": torch.tensor(3.0)}, {"phi": torch.tensor(2.0)}
        >>> result = hypergradient(
        ...     lambda p, m, batch: m["phi"] * p["w"] ** 2 / 2, lambda p, m: p["w"] ** 2 / 2,
        ...     w, phi, [None], optimizer=torchopt.sgd(lr=0.1), estimator=OneStep())
        >>> result.gradient["phi"]  # theta' = (1 - 0.1 phi) w; d outer / d phi = -0.1 w theta'
        tensor(-0.7200)
    """

    mode: Mode = "auto"
    parameters: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "forward", "reverse"):
            raise MetaKDError(f"OneStep has the modes 'auto', 'forward' and 'reverse', not {self.mode!r}")
        if self.parameters is None:
            return
        if isinstance(self.parameters, str) or not self.parameters:
            raise MetaKDError(f"parameters must be patterns such as ('classifier.*',) or None, got {self.parameters!r}")
        object.__setattr__(self, "parameters", tuple(self.parameters))  # a list is not hashable

    def __call__(self, problem: Problem) -> Hypergradient:
        """Estimate d outer / d phi; see the class."""
        if len(problem.batches) != 1:
            raise MetaKDError(
                f"OneStep is the hypergradient of exactly one inner step, got {len(problem.batches)} batches; use "
                "estimators.Adjoint() for K steps"
            )
        # The gradient in theta_0 needs `later`'s product in params. With a subset it would miss the other parameters.
        both = self.mode != "forward" and self.parameters is None
        found = walk_back(
            self.solved(problem), 1, first=mixed_alone(self.mode), later=reverse_over_reverse, params_gradient=both
        )
        return found._replace(params={**problem.params, **found.params})

    def exact(self, steps: int) -> bool:
        """Whether the answer is exact for this many inner steps."""
        return True

    @property
    def needs_forward_mode(self) -> bool:
        """Whether it needs forward mode."""
        return self.mode == "forward"

    @property
    def takes_shards(self) -> bool:
        """Whether it works on a student of `fully_shard`: in forward mode."""
        return self.mode != "reverse"

    def solved(self, problem: Problem) -> Problem:
        """The problem whose hypergradient this is: its step moves only `parameters`."""
        return problem if self.parameters is None else moving_only(problem, self.parameters)
