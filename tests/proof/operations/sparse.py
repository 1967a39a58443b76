"""Sparse matrices and sparse gradients."""

import torch
import torch.nn.functional as F

from tests.proof.registry import eye, grid, operation, operations, picks


def constant(*shape):
    return grid(*shape).relu()


def sparse(a):
    """Some of the operand's numbers, as the values of a sparse matrix."""
    places = constant(*a.shape).nonzero().T
    return torch.sparse_coo_tensor(places, a[tuple(places)], a.shape, check_invariants=False)


operations(
    sparse_by_constant=lambda x, a: torch.sparse.mm(constant(*a.shape).to_sparse(), (x @ a).T).T,
    sparse_addmm=lambda x, a: torch.sparse.addmm(x.T, eye(a).to_sparse(), (x @ a).T).T,
    sparse_inputs=lambda x, a: torch.sparse.mm(constant(len(x), len(a)).to_sparse(), a) * x,
    csr_by_constant=lambda x, a: (constant(*a.shape).to_sparse_csr() @ (x @ a).T).T,
    csr_inputs=lambda x, a: (constant(len(x), len(a)).to_sparse_csr() @ a) * x,
    to_sparse=lambda x, a: torch.sparse.mm(a.to_sparse(), x.T).T,
    to_sparse_and_back=lambda x, a: x @ a.to_sparse().to_dense(),
    to_sparse_csr=lambda x, a: (a.to_sparse_csr() @ x.T).T,
)
# The gradient in the values of a sparse tensor is read with `_values()`, which autograd does not follow.
operations(
    {"wrong_in_torch": True},
    sparse_by_values=lambda x, a: torch.sparse.mm(sparse(a), x.T).T,
    sparse_by_sparse=lambda x, a: x @ torch.sparse.mm(sparse(a), sparse(a)).to_dense(),
    sparse_softmax=lambda x, a: x @ torch.sparse.softmax(sparse(a), 1).to_dense(),
    sparse_sum=lambda x, a: x * torch.sparse.sum(sparse(a), 1).to_dense(),
    sparse_to_dense=lambda x, a: x @ sparse(a).to_dense(),
    sparse_values=lambda x, a: x * sparse(a).coalesce().values().sin().sum(),
)


@operation(needs_weights=True)
def embedding_sparse(x, a):
    """Its gradient is a sparse tensor."""
    return x * F.embedding(picks(len(x), 1, len(a))[:, 0], a, sparse=True)
