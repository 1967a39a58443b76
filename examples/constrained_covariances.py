"""Learn how much to trust each sensor: noise covariances of a trajectory estimator that stay well conditioned.

    python examples/constrained_covariances.py --output runs/constrained_covariances

Inner problem: the most likely trajectory of a planar vehicle from odometry, GPS and ranges to three beacons, nonlinear
least squares. Outer problem: the error of 20 such trajectories whose truth is known, over the covariances of the three
sensors, which start wrong by factors of 100. Claim (Qadri, Manchester, Kaess, arXiv 2309.09718): covariances with
bounded eigenvalues stay well conditioned and track as well as the true ones.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
import torchopt
from matplotlib.figure import Figure
from torch.func import jacfwd, vmap

from metakd import check_hypergradient, hypergradient
from metakd.constraints import BoundedEigenvalues
from metakd.estimators import Adjoint, FiniteDifference, Implicit, Unroll
from metakd.longtail import provenance
from metakd.longtail.checkpoint import write_atomically

torch.set_default_dtype(torch.float64)
BEACONS = 80 * torch.tensor([[0.0, 1.0], [0.87, -0.5], [-0.87, -0.5]])
TRUE = {
    "odometry": torch.diag(torch.tensor([0.05, 0.005, 0.01]) ** 2),  # forwards, sideways, turn
    "gps": torch.tensor([[0.50, 0.27], [0.27, 0.20]]),
    "range": torch.tensor([[0.3**2]]),
}
WRONG = {name: TRUE[name] * factor for name, factor in (("odometry", 100.0), ("gps", 0.01), ("range", 0.01))}
KAPPA = 1e5
MAPS = {"bounded": BoundedEigenvalues(1e-5, 1e-5 * KAPPA), "unbounded": BoundedEigenvalues(1e-15, 1e10)}


def covariance(parts):
    """That of all that is measured in a step, (8, 8)."""
    return torch.block_diag(parts["odometry"], parts["gps"], parts["range"] * torch.eye(len(BEACONS)))


def measured(pairs):
    """What the sensors show, without noise, in steps between two poses (x, y, heading): (..., 6) -> (..., 8)."""
    move, heading, new = pairs[..., 3:] - pairs[..., :3], pairs[..., 2:3], pairs[..., 3:5]
    (dx, dy), c, s = move[..., :2].split(1, -1), heading.cos(), heading.sin()
    ranges = (new[..., None, :] - BEACONS).norm(dim=-1)
    return torch.cat([c * dx + s * dy, c * dy - s * dx, move[..., 2:], new, ranges], -1)


def pairs_of(x):
    """Successive poses of trajectories (N, T, 3), (N, T, 6); all start at a known pose, the origin."""
    path = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    return torch.cat([path[:, :-1], path[:, 1:]], -1)


def simulate(count, length, generator):
    """True trajectories (N, T, 3) and measurements (N, T, 8)."""
    phase = 6.28 * torch.rand(count, 1, generator=generator)
    turns = 0.15 * torch.sin(0.15 * torch.arange(length) + phase)
    old = turns.cumsum(1) - turns
    x = torch.stack([old.cos().cumsum(1), old.sin().cumsum(1), old + turns], -1)
    noise = torch.randn(count, length, 8, generator=generator) @ torch.linalg.cholesky(covariance(TRUE)).mT
    return x, measured(pairs_of(x)) + noise


def solve(y, parts, x=None):
    """Gauss-Newton: the most likely trajectories, and the Cholesky factors of their information matrices."""
    x = torch.cat([y[..., 3:5], y[..., 2:3].cumsum(1)], -1) if x is None else x
    information, size = torch.linalg.inv(covariance(parts)), 3 * x.shape[1] + 3
    for _ in range(200):
        jacobian = vmap(vmap(jacfwd(measured)))(pairs_of(x))
        residual = torch.cat([jacobian, (measured(pairs_of(x)) - y)[..., None]], -1)
        blocks = jacobian.mT @ information @ residual  # (N, T, 6, 6 + 1)
        matrix, slope = torch.zeros(len(x), size, size), torch.zeros(len(x), size, 1)
        for t in range(x.shape[1]):
            here = slice(3 * t, 3 * t + 6)
            matrix[:, here, here] += blocks[:, t, :, :6]
            slope[:, here] += blocks[:, t, :, 6:]
        factor = torch.linalg.cholesky(matrix[:, 3:, 3:])
        step = torch.cholesky_solve(slope[:, 3:], factor).view_as(x)
        x = x - step
        if step.abs().max() < 1e-8:
            break
    return x, factor


def error(x, truth):
    """Root mean square error of the positions, in metres."""
    return (x - truth)[..., :2].pow(2).sum(-1).mean().sqrt()


def problem(truth, y, free, constrain, start=None):
    """The arguments of `hypergradient` at the optimum, and the optimum x*.

    The inner parameters are z in x = x* + L^-T z with the information matrix L L^T, so that the Hessian is near the
    identity: conjugate gradients take few steps, and gradient descent with a step size of 1 is Gauss-Newton.
    """
    optimum, factor = solve(y, {name: constrain(value) for name, value in free.items()}, start)
    unwhiten = torch.linalg.inv(factor)

    def at(params):
        return optimum + (params["z"][:, None] @ unwhiten).view_as(optimum)

    def inner(params, phi, batch):
        residual = measured(pairs_of(at(params))) - y
        information = torch.linalg.inv(covariance({name: constrain(value) for name, value in phi.items()}))
        return (residual @ information * residual).sum() / 2

    z = torch.zeros(len(y), factor.shape[-1])
    return (inner, lambda params, phi: error(at(params), truth).log(), {"z": z}, free), optimum


def agreement(truth, y, steps=30):
    """Largest relative errors of hypergradients at the start, against central finite differences."""
    free = {name: MAPS["bounded"].right_inverse(value) for name, value in WRONG.items()}
    arguments, _ = problem(truth, y, free, MAPS["bounded"])
    options = {"optimizer": torchopt.sgd(lr=1.0), "directions": 1, "tolerance": 1e-4}
    found = {}
    for estimator in (Implicit(steps=steps), Unroll(), Adjoint(), FiniteDifference(1e-4)):
        check = check_hypergradient(*arguments, [None] * steps, estimator=estimator, **options)
        found[type(estimator).__name__] = max(check.relative_error.values())
    return found


def learn(truth, y, constrain, steps):
    """Adam on the free matrices; the covariances, and for each step the training error and the condition number."""
    free = {name: constrain.right_inverse(value).requires_grad_() for name, value in WRONG.items()}
    optimizer, x, history = torch.optim.Adam(free.values(), lr=0.3, betas=(0.9, 0.99)), None, []
    for _ in range(steps):
        arguments, x = problem(truth, y, {name: value.detach() for name, value in free.items()}, constrain, x)
        found = hypergradient(*arguments, [None], optimizer=torchopt.sgd(lr=1.0), estimator=Implicit(steps=8))
        for name, value in free.items():
            value.grad = found.gradient[name]
        optimizer.step()
        parts = {name: constrain(value.detach()) for name, value in free.items()}
        history.append((float(found.outer_loss.exp()), float(torch.linalg.cond(covariance(parts)))))
    return parts, history


def run(seed, steps=60, count=20, length=50):
    """One seed: for each noise model its test error, its condition number, and how it was learned."""
    generator = torch.Generator().manual_seed(seed)
    train, (truth, y) = simulate(count, length, generator), simulate(count, length, generator)
    models = {"true": (TRUE, []), "wrong": (WRONG, [])}
    models |= {name: learn(*train, constrain, steps) for name, constrain in MAPS.items()}
    errors = {name: float(error(solve(y, parts)[0], truth)) for name, (parts, _) in models.items()}
    conditions = {name: float(torch.linalg.cond(covariance(parts))) for name, (parts, _) in models.items()}
    return errors, conditions, {name: history for name, (_, history) in models.items() if history}


def draw(runs, path):
    """Training error and condition number while learning, and the test error in the end; a line or dot a seed."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for errors, _, histories in runs:
        for (name, history), colour in zip(histories.items(), ("#0072B2", "#D55E00"), strict=True):
            for panel, values in zip(panels, zip(*history, strict=True), strict=False):
                panel.semilogy(values, color=colour, label=name if errors is runs[0][0] else None)
        panels[2].semilogy(errors.keys(), errors.values(), "o-", color="#999999")
    panels[1].axhline(KAPPA, color="black", linestyle="--", label="bound")
    panels[1].legend(frameon=False)
    panels[0].set(title="Training error: RMSE (m)", xlabel="outer step")
    panels[1].set(title="Condition number of the noise model", xlabel="outer step")
    panels[2].set(title="Test error: RMSE (m), a line a seed", xlabel="covariances")
    figure.savefig(path, dpi=150)


def main():
    """Run the seeds, print the figures beside the claim, write the record and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/constrained_covariances"))
    args = parser.parse_args()
    check = agreement(*simulate(5, 50, torch.Generator().manual_seed(0)))
    print("hypergradient's error (0: below rounding):", ", ".join(f"{k} {v:.0e}" for k, v in check.items()), flush=True)
    runs = [run(seed) for seed in range(args.seeds)]
    print("covariances  test RMSE (m)  over the true ones'  condition number, smallest to largest")
    for name in runs[0][0]:
        errors, over = mean(one[0][name] for one in runs), mean(one[0][name] / one[0]["true"] for one in runs)
        conditions = sorted(one[1][name] for one in runs)
        print(f"{name:11} {errors:14.4f} {over:19.3f}  {conditions[0]:.1e} to {conditions[-1]:.1e}")
    print(f"claim: bounded within 5 % of the true ones (1.05), its condition number below {KAPPA:.0e}")
    record = provenance() | {
        "seeds": args.seeds,
        "hypergradient_error": check,
        "runs": [dict(zip(("test_error", "condition", "history"), one, strict=True)) for one in runs],
    }
    write_atomically(args.output / "results.json", lambda path: path.write_text(json.dumps(record) + "\n"))
    draw(runs, args.output / "covariances.png")


if __name__ == "__main__":
    main()
