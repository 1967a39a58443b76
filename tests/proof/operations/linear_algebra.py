"""Determinants, solvers, factorisations, products."""

import torch
import torch.nn.functional as F

from tests.proof.registry import eye, grid, operation, operations, shaped, spread

linalg = torch.linalg


def near_one(a):
    return eye(a) + 0.3 * a.tanh()


def positive(a):
    return eye(a) * torch.arange(1.0, len(a) + 1, dtype=a.dtype) + 0.3 * a @ a.T / (1 + a.square().sum())


def a_matrix_each(x, a):
    """(B, D, D), near the identity."""
    return eye(a) + 0.3 * (x[:, :, None] * a).tanh()


operations(
    det=lambda x, a: x * linalg.det(near_one(a)),
    old_det=lambda x, a: x * torch.det(near_one(a)),
    det_each=lambda x, a: linalg.det(a_matrix_each(x, a)),
    logdet=lambda x, a: x * (1 + torch.logdet(positive(a))),
    logdet_each=lambda x, a: torch.logdet(a_matrix_each(x, a) @ a_matrix_each(x, a).mT + eye(a)),
    slogdet=lambda x, a: linalg.slogdet(a_matrix_each(x, a))[1],
    inverse=lambda x, a: x @ linalg.inv(near_one(a)),
    inverse_each=lambda x, a: linalg.inv(a_matrix_each(x, a)),
    solve=lambda x, a: linalg.solve(near_one(a), x.T).T,
    solve_each=lambda x, a: linalg.solve(a_matrix_each(x, a), x),
    solve_triangular=lambda x, a: linalg.solve_triangular(near_one(a), x.T, upper=True).T,
    lstsq=lambda x, a: linalg.lstsq(torch.cat([near_one(a), a.tanh()]), torch.cat([x.T, x.T])).solution.T,
    pinv=lambda x, a: x @ linalg.pinv(near_one(a)),
    cholesky=lambda x, a: x @ linalg.cholesky(positive(a)),
    cholesky_inverse=lambda x, a: x @ torch.cholesky_inverse(linalg.cholesky(positive(a))),
    cholesky_solve=lambda x, a: torch.cholesky_solve(x.T, linalg.cholesky(positive(a))).T,
    lu_solve=lambda x, a: linalg.lu_solve(*linalg.lu_factor(near_one(a)), x.T).T,
    lu=lambda x, a: x @ linalg.lu(near_one(a))[2],
    qr=lambda x, a: x @ linalg.qr(near_one(a))[1],
    eigh=lambda x, a: x * linalg.eigh(positive(a))[0],
    eigvalsh_each=lambda x, a: linalg.eigvalsh(positive(a) + (0.1 * x.tanh()).diag_embed()),
    eig=lambda x, a: x @ (lambda e: (e[1] @ e[0].exp().diag_embed() @ linalg.inv(e[1])).real)(linalg.eig(near_one(a))),
    eigvals=lambda x, a: x * linalg.eigvals(positive(a) + 0.1 * a.tanh().triu(1)).exp().real.sum(),
    svdvals=lambda x, a: x * linalg.svdvals(near_one(a)),
    svd=lambda x, a: x @ (lambda s: s[0] @ (s[1] ** 2).diag_embed() @ s[0].mT)(linalg.svd(near_one(a))),
    matrix_exp=lambda x, a: x @ linalg.matrix_exp(0.5 * a.tanh()),
    matrix_power=lambda x, a: x @ linalg.matrix_power(near_one(a), 3),
    condition=lambda x, a: x / linalg.cond(positive(a)),
    householder=lambda x, a: x @ linalg.householder_product(*torch.geqrf(near_one(grid(*a.shape)))) @ a,
    multi_dot=lambda x, a: linalg.multi_dot([x, a, a.T]),
    kron=lambda x, a: spread(x, 4) @ torch.kron(shaped(a, 2, 2), shaped(a, 2, 2)),
    tensordot=lambda x, a: torch.tensordot(x, a, dims=([1], [0])),
    einsum=lambda x, a: torch.einsum("bi,ij,bj->bi", x, a, x.tanh()),
    einsum_trace=lambda x, a: torch.einsum("bi,ij,jk,kb->b", x, a, a, x.T),
    bilinear=lambda x, a: F.bilinear(x, x.tanh(), torch.stack([a, a.T]), a[0, :2]),
    addmm=lambda x, a: torch.addmm(x, x, a, beta=0.5, alpha=0.7),
    baddbmm=lambda x, a: torch.baddbmm(spread(x, 2, 2), spread(x, 2, 3), spread(x @ a, 3, 2)),
    addbmm=lambda x, a: torch.addbmm(a, spread(x, 2, len(a)).mT, spread(x, 2, len(a)))[:1].expand(len(x), -1) * x,
    addmv=lambda x, a: torch.addmv(x[:, 0], x, a[0]),
    addr=lambda x, a: torch.addr(x, x[:, 0], a[0]),
    outer=lambda x, a: torch.outer(x[:, 0], a[0]),
    cross=lambda x, a: linalg.cross(spread(x, 3), spread(x @ a, 3)),
    inner_product=lambda x, a: torch.inner(x, a),
    vander=lambda x, a: linalg.vander((x @ a).tanh(), N=3),
    tensorinv=lambda x, a: x @ linalg.tensorinv(near_one(a), ind=1),
    vecdot=lambda x, a: linalg.vecdot(x, x @ a),
    eigenvectors=lambda x, a: x @ (lambda e: e[1] @ e[0].exp().diag_embed() @ e[1].T)(linalg.eigh(positive(a))),
    lowest_singular_value=lambda x, a: x / linalg.matrix_norm(near_one(a), -2),
    tensorsolve=lambda x, a: linalg.tensorsolve(near_one(a), x[0]) * x,
    block_diag=lambda x, a: spread(x, 4) @ torch.block_diag(shaped(a, 2, 2), shaped(a, 2, 2)),
)


@operation
def power_iteration(x, a):
    """A spectral norm by a few steps, with the vector detached, would be by autograd; this one keeps its graph."""
    v = grid(len(a))
    for _ in range(3):
        v = F.normalize(a.T @ (a @ v), dim=0)
    return x / (1 + (a @ v).square().sum())
