"""Reading and writing by index, embeddings, shapes, writing in place."""

import torch
import torch.nn.functional as F

from tests.proof.registry import grid, operation, operations, picks, shaped, spread


def columns(x, n=4):
    """Indices (B, n) of the columns of x."""
    return picks(len(x), n, x.shape[1])


def reduced(how, include):
    def scatter_reduce(x, a):
        return (1 + x.tanh()).scatter_reduce(1, columns(x), spread(1.5 + (x @ a).tanh(), 4), how, include_self=include)

    return scatter_reduce


def index_reduced(how, include):
    def index_reduce(x, a):
        start, index = 1 + x.tanh(), torch.arange(len(x) + 2) % (len(x) - 1)
        source = 1.5 + (x @ a).tanh()
        return start.index_reduce(0, index, torch.cat([source, source[:2]]), how, include_self=include)

    return index_reduce


for _how in ("sum", "prod", "mean", "amax", "amin"):
    for _include in (True, False):
        operations(**{f"scatter_reduce_{_how}{'' if _include else '_without_self'}": reduced(_how, _include)})
        if _how != "sum":
            operations(**{f"index_reduce_{_how}{'' if _include else '_without_self'}": index_reduced(_how, _include)})

operations(
    gather=lambda x, a: (x @ a).gather(1, columns(x)),
    scatter=lambda x, a: x.scatter(1, columns(x, 1), (x @ a)[:, :1]),
    scatter_add=lambda x, a: x.scatter_add(1, columns(x), spread(x @ a, 4)),
    index_add=lambda x, a: x.index_add(0, torch.arange(len(x)) // 2, x @ a, alpha=0.7),
    index_copy=lambda x, a: x.index_copy(1, torch.tensor([1, 0]), (x @ a)[:, :2]),
    index_fill=lambda x, a: (x @ a).index_fill(1, torch.tensor([1]), 0.3),
    index_fill_by_tensor=lambda x, a: x.index_fill(1, torch.tensor([1]), a.sum().tanh()),
    index_select=lambda x, a: (x @ a).index_select(1, torch.tensor([1, 0, 1])),
    index_put=lambda x, a: x.index_put(
        (torch.arange(len(x)), picks(len(x), 1, x.shape[1])[:, 0]), (x @ a)[:, 0], accumulate=True
    ),
    take_along_dim=lambda x, a: torch.take_along_dim(x @ a, (x @ a).argsort(1), 1),
    take=lambda x, a: (x @ a).take(picks(len(x), 2, x.numel())),
    put=lambda x, a: x.put(picks(len(x), 1, x.numel()), (x @ a)[:, :1], accumulate=True),
    advanced_index=lambda x, a: (x @ a)[torch.arange(len(x)).flip(0)][:, [0, 1, 1]],
    boolean_index=lambda x, a: x * (x @ a)[x > 0].sum().tanh(),
    masked_fill=lambda x, a: (x @ a).masked_fill(x > 0.2, -0.3),
    masked_scatter=lambda x, a: x.masked_scatter(grid(*x.shape) > 0, x @ a),
    masked_select=lambda x, a: x + (x @ a).masked_select(grid(*x.shape) > 0).square().mean(),
    select_scatter=lambda x, a: x.select_scatter((x @ a)[:, 0], 1, 1),
    slice_scatter=lambda x, a: x.slice_scatter((x @ a)[:, :2], 1, 0, 2),
    diagonal_scatter=lambda x, a: x @ a.diagonal_scatter(a.square().sum(0)),
    diagonal=lambda x, a: x * (a @ a).diagonal(),
    diag_embed=lambda x, a: torch.diag_embed(x @ a),
    trace=lambda x, a: x * (a @ a).trace(),
    tril=lambda x, a: x @ a.tril() @ a.triu(1),
    roll=lambda x, a: (x @ a).roll((1, 1), (0, 1)) * x,
    flip=lambda x, a: (x @ a).flip(1) * x,
    rot90=lambda x, a: x @ torch.rot90(a) @ a,
    repeat_interleave=lambda x, a: (x @ a).repeat_interleave(2, 1),
    repeat=lambda x, a: (x @ a).repeat(1, 2),
    expand=lambda x, a: (x @ a)[:, None].expand(-1, 3, -1) * grid(3, 1),
    movedim=lambda x, a: spread(x @ a, 2, 3).movedim(1, 2).contiguous() * grid(3, 2),
    as_strided=lambda x, a: (x @ a).as_strided((len(x), 2), (x.shape[1], 1), 1),
    split=lambda x, a: torch.cat([part.sum(1, keepdim=True).sin() for part in (x @ a).split(2, 1)], 1),
    unbind=lambda x, a: torch.stack([column.sin() for column in (x @ a).unbind(1)], 1),
    chunk_and_stack=lambda x, a: torch.hstack([part * 2 for part in (x @ a).chunk(2, 1)]),
    meshgrid=lambda x, a: torch.stack(torch.meshgrid(x[:, 0], a[0], indexing="ij")).prod(0),
    cartesian=lambda x, a: x + torch.cartesian_prod(a[0], a[:, 1]).prod(1).mean(),
    combinations=lambda x, a: x * torch.combinations(a[0], 2).prod(1).mean(),
    embedding=lambda x, a: F.embedding(columns(x, 2), x @ a if len(x) >= x.shape[1] else a) * x.mean(),
    embedding_table=lambda x, a: F.embedding(columns(x, 2), a) * x.mean(),
    embedding_bag_sum=lambda x, a: F.embedding_bag(columns(x), a, mode="sum", per_sample_weights=spread(x, 4)),
    embedding_bag_mean=lambda x, a: x * F.embedding_bag(columns(x), a, mode="mean"),
    embedding_bag_max=lambda x, a: x * F.embedding_bag(columns(x), a, mode="max"),
    segment_reduce=lambda x, a: x * torch.segment_reduce(x @ a, "max", lengths=torch.tensor([1, len(x) - 1])).sum(0),
    index_put_without_sum=lambda x, a: x.index_put((torch.tensor([0, 1]),), (x @ a)[:2]),
    one_hot=lambda x, a: x * (F.one_hot(columns(x, 1)[:, 0], x.shape[1]).double() @ a),
    nested_sequence=lambda x, a: torch.nn.utils.rnn.pad_sequence([row[: 2 + i % 2] for i, row in enumerate(x @ a)]).T,
)


@operation(by_autograd=True)
def embedding_padded(x, a):
    """Autograd leaves out the gradient of the padding's row."""
    return x + F.embedding(columns(x, 1)[:, 0], a, padding_idx=1)


@operation
def write_columns(x, a):
    made = torch.zeros_like(x)
    made[:, 0] = (x @ a)[:, 0]
    made[:, 1:] = x[:, 1:] * a[0, 1:]
    return made


@operation
def in_place(x, a):
    return (x @ a).mul_(a[0]).add_(x).tanh_().exp()


@operation
def in_place_view(x, a):
    made = (x @ a).clone()
    made[:, ::2].mul_(x[:, ::2])
    made.t()[1].exp_()
    return made


@operation
def in_place_accumulation(x, a):
    total = torch.zeros(len(x), dtype=x.dtype)
    for column in (x @ a).unbind(1):
        total += column.sin() * shaped(a, 1)
    return total
