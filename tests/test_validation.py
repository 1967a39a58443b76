"""Every finding is there where it should be, nowhere else, and true."""

import re
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import spectral_norm as old_spectral_norm
from torch.utils.checkpoint import checkpoint

from metakd import BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, terms
from metakd.validation import validate
from tests.slow import slow_but
from tests.zoo import (
    CHECKPOINTS_HAVE_FORWARD_MODE,
    CLASSES,
    ZOO,
    LastState,
    conv,
    images,
    meet,
    mlp,
    rows,
    sequences,
    tokens,
)

ONCE = {"forward": estimators.OneStep("forward"), "reverse": estimators.OneStep("reverse")}


def balancer_of(student, optimizer=None, estimator=ONCE["reverse"], **options):
    torch.manual_seed(7)  # the weight model's start
    optimizer = optimizer or torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    both = {"hard": terms.CrossEntropy(), "smooth": terms.CrossEntropy(label_smoothing=0.3)}
    return BilevelLossBalancer(student, both, optimizer=optimizer, inner="mirror", estimator=estimator, **options)


def batch_of(inputs, size=5):
    return inputs(size), torch.randint(CLASSES, (size,))


def is_exact(student, inputs, estimator, steps=1):
    """Whether the hypergradient agrees with finite differences; whatever raises, raises."""
    balancer = balancer_of(student, estimator=estimator)
    batches = [batch_of(inputs, 5 + t) for t in range(steps)]
    found = check_hypergradient(balancer, batches, batch_of(inputs), directions=1, tolerance=1e9)
    return max(found.relative_error.values()) < 1e-6


def about(student, words, **options):
    return [finding for finding in validate(student, **options) if words in str(finding)]


class Words(nn.Module):
    """A table of embeddings, read by a linear layer."""

    def __init__(self, table):
        super().__init__()
        self.table, self.head = table, nn.Linear(4, CLASSES)

    def forward(self, x):
        z = self.table(x)
        return self.head(torch.tanh(z if z.dim() == 2 else z.mean(1)))


class Recomputed(nn.Module):
    """Checkpoints its middle in the style of Hugging Face models."""

    def __init__(self, middle, **options):
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 6), middle, nn.Linear(6, CLASSES)
        self.gradient_checkpointing = bool(options)
        self._gradient_checkpointing_func = partial(checkpoint, **options)

    def forward(self, x):
        x = self.first(x)
        if self.gradient_checkpointing and self.training:
            return self.head(self._gradient_checkpointing_func(self.middle, x))
        return self.head(self.middle(x))


def wrapped(implementation):
    middle = checkpoint_wrapper(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), checkpoint_impl=implementation)
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, CLASSES))


def hooked_weight_norm():
    layer = nn.Linear(4, 6)
    nn.utils.weight_norm(layer)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, CLASSES))


def normalised(norm):
    return nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, CLASSES))


def compiled_method():
    student = mlp(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    student[1].compile(backend="aot_eager")
    return student


def half_frozen():
    student = mlp(nn.Tanh())
    student[0].requires_grad_(False)
    return student


def attending():
    return ZOO["multihead_attention"].build()


def compiled_part():
    return mlp(torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), backend="aot_eager"))


class Works(NamedTuple):
    """A student with a finding that is exact all the same, and one without the finding."""

    build: object
    words: str
    where: str
    other: object = lambda: mlp(nn.Tanh())
    inputs: object = rows


WORKS = {
    "attention": Works(attending, "math kernel", "attention (MultiheadAttention)", inputs=sequences),
    "lstm": Works(lambda: LastState(nn.LSTM(4, 5, batch_first=True)), "oneDNN", "rnn (LSTM)", inputs=sequences),
    "weight_norm": Works(
        lambda: normalised(parametrizations.weight_norm), "fused weight norm", "0 (ParametrizedLinear)"
    ),
    "weight_norm_hook": Works(hooked_weight_norm, "fused weight norm", "0 (Linear)"),
    "sparse": Works(
        lambda: Words(nn.Embedding(CLASSES, 4, sparse=True)),
        "gradient is dense",
        "table (Embedding)",
        lambda: Words(nn.Embedding(CLASSES, 4)),
        tokens,
    ),
    "frozen": Works(half_frozen, "they are frozen", "2 of 4 parameters (0.weight, 0.bias)"),
    "compiled_part": Works(compiled_part, "run it as written", "1 (OptimizedModule)"),
    "compiled_method": Works(compiled_method, "run it as written", "1 (Sequential)"),
    "compiled": Works(lambda: torch.compile(mlp(nn.Tanh()), backend="eager"), "the wrapper", "(OptimizedModule)"),
    "data_parallel": Works(lambda: nn.DataParallel(mlp(nn.Tanh())), "the wrapper", "the student (DataParallel)"),
    "batch_norm": Works(
        lambda: conv(nn.BatchNorm2d(4)),
        "single value per channel",
        "1 (BatchNorm2d)",
        lambda: conv(nn.BatchNorm2d(4)).eval(),
        images,
    ),
    "sync_batch_norm": Works(
        lambda: conv(nn.SyncBatchNorm(4)), "several processes", "1 (SyncBatchNorm)", ZOO["batch_norm"].build, images
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's tracer
@pytest.mark.parametrize("name", slow_but(("weight_norm", "sparse", "frozen", "data_parallel"), WORKS))
def test_notes_are_handled(name):
    case = WORKS[name]
    (finding,) = about(case.build(), case.words)
    assert finding.level == "note" and finding.where.endswith(case.where) and finding.forward_mode
    assert not about(case.other(), case.words)
    assert not [f for f in validate(case.build()) if f.level != "note"]
    for estimator, steps in ((ONCE["forward"], 1), (ONCE["reverse"], 1), (estimators.Adjoint(), 2)):
        assert is_exact(case.build().double(), case.inputs, estimator, steps), estimator


class Fails(NamedTuple):
    """A student that raises, whatever the estimator, and one like it that works."""

    build: object
    words: str
    cured: object
    inputs: object = rows


FAILS = {
    "max_norm": Fails(
        lambda: Words(nn.Embedding(CLASSES, 4, max_norm=0.5)),
        "with max_norm",
        lambda: Words(nn.Embedding(CLASSES, 4)),
        tokens,
    ),
    "scale_grad_by_freq": Fails(
        lambda: Words(nn.Embedding(CLASSES, 4, scale_grad_by_freq=True)),
        "with scale_grad_by_freq",
        lambda: Words(nn.Embedding(CLASSES, 4)),
        tokens,
    ),
    "reentrant": Fails(
        lambda: Recomputed(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), use_reentrant=True),
        "re-entry",
        lambda: Recomputed(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), use_reentrant=False),
    ),
    "reentrant_wrapper": Fails(
        lambda: wrapped(CheckpointImpl.REENTRANT), "re-entry", lambda: wrapped(CheckpointImpl.NO_REENTRANT)
    ),
    "embedding_bag": Fails(
        lambda: Words(nn.EmbeddingBag(CLASSES, 4)),
        "neither forward mode nor second derivatives",
        lambda: Words(nn.Embedding(CLASSES, 4)),
        tokens,
    ),
    "cross_map": Fails(
        lambda: conv(nn.CrossMapLRN2d(2)),
        "neither forward mode nor second derivatives",
        lambda: conv(nn.LocalResponseNorm(2)),
        images,
    ),
}


@pytest.mark.filterwarnings("ignore:an operation of this model has no forward-mode derivative")
@pytest.mark.parametrize("name", slow_but(("max_norm", "embedding_bag"), FAILS))
def test_errors_raise_and_their_cures_work(name):
    case = FAILS[name]
    (finding,) = about(case.build(), case.words)
    assert finding.level == "error"
    assert not [f for f in validate(case.cured()) if f.level != "note"]
    ways = [(ONCE["forward"], 1), (ONCE["reverse"], 1), (estimators.Adjoint(), 2)]
    for estimator, steps in ways if CHECKPOINTS_HAVE_FORWARD_MODE or "reentrant" not in name else ways[1:]:
        with pytest.raises((MetaKDError, RuntimeError)):
            is_exact(case.build().double(), case.inputs, estimator, steps)
        assert is_exact(case.cured().double(), case.inputs, estimator, steps), estimator


@pytest.mark.parametrize("name", ["embedding_bag", "cross_map"])
def test_finite_differences_need_no_second_derivatives(name):
    case = FAILS[name]
    assert not about(case.build(), case.words, estimator=estimators.FiniteDifference())
    assert not about(case.build(), case.words)[0].forward_mode
    found = []
    for student, estimator in ((case.build(), estimators.FiniteDifference(1e-4)), (case.cured(), ONCE["reverse"])):
        if name == "embedding_bag":  # the two have the same parameters, and compute the same
            torch.manual_seed(1)
            student.double().load_state_dict({k: torch.randn_like(v) for k, v in student.state_dict().items()})
        balancer = balancer_of(student.double(), estimator=estimator)
        torch.manual_seed(2)
        balancer(batch_of(case.inputs), batch_of(case.inputs))
        found.append(balancer.report.influence)
    assert found[0].norm() > 0
    if name == "embedding_bag":
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


SPECTRAL = {"parametrization": parametrizations.spectral_norm, "hook": old_spectral_norm}


@pytest.mark.filterwarnings("ignore:.*in train mode every gradient of spectral norm")
@pytest.mark.parametrize("norm", SPECTRAL)
def test_spectral_norm_holds_its_vectors_fixed_in_train_mode(norm):
    def build():
        torch.manual_seed(0)
        return normalised(SPECTRAL[norm]).double()

    (finding,) = about(build(), "spectral norm")
    assert finding.level == "warning" and finding.where.startswith("0 (")
    assert not about(build().eval(), "spectral norm")
    assert not about(nn.Sequential(build()[0].requires_grad_(False), nn.Linear(6, CLASSES)), "spectral norm")
    assert not is_exact(build(), rows, ONCE["forward"])
    assert is_exact(build().eval(), rows, ONCE["forward"])
    found = []
    for estimator in (*ONCE.values(), estimators.Unroll()):
        balancer = balancer_of(build(), estimator=estimator)
        torch.manual_seed(1)
        balancer(batch_of(rows), batch_of(rows))
        found.append(balancer.report.influence)
    torch.testing.assert_close(found[0], found[2], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found[1], found[2], rtol=1e-10, atol=1e-14)


def test_batch_norm_raises_on_a_single_value():
    student = mlp(nn.BatchNorm1d(6)).double()
    balancer, meta = balancer_of(student), batch_of(rows)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    for step in (
        lambda: balancer(batch_of(rows, 1), meta),
        lambda: balancer(meta, batch_of(rows, 1)),
        lambda: balancer.meta_step([batch_of(rows, 1)], meta),
    ):
        with pytest.raises(MetaKDError, match=r"more than 1 value per channel.*drop_last=True"):
            step()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_sync_batch_norm_among_processes(monkeypatch):
    student = conv(nn.SyncBatchNorm(4))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for size, level in ((1, "note"), (2, "error")):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda size=size: size)
        (finding,) = about(student, "several processes")
        assert finding.level == level and finding.forward_mode == (size == 1)
    assert not about(student, "several processes", estimator=estimators.FiniteDifference())
    kernel = torch.nn.modules._functions.SyncBatchNorm  # what several processes run
    assert kernel.jvp is torch.autograd.Function.jvp


def test_parameters_that_do_not_train():
    (finding,) = validate(mlp(nn.Tanh()).requires_grad_(False))
    assert finding.level == "error" and "none of its 4 parameters" in str(finding)
    with pytest.raises(MetaKDError, match="trainable"):
        balancer_of(mlp(nn.Tanh()).requires_grad_(False), torch.optim.SGD(nn.Linear(1, 1).parameters()))


def test_lazy_parameters():
    student = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyBatchNorm1d(), nn.Linear(4, CLASSES))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    finding = validate(student, optimizer)[0]
    assert finding.level == "error" and finding.where == "0.weight, 0.bias, 2.weight and 1 more"
    with pytest.raises((MetaKDError, ValueError), match=r"uninitialized|lazy"):
        balancer_of(student, optimizer)
    student(torch.randn(5, 4))
    assert not about(student, "lazy")


OPTIMIZERS = {
    "missing": (lambda s: torch.optim.SGD(s[0].parameters(), lr=0.1), "error", "2.weight, 2.bias: 2 trainable"),
    "another": (lambda s: torch.optim.SGD(mlp().parameters(), lr=0.1), "error", "none of the student's"),
    "foreign": (
        lambda s: torch.optim.SGD([*s.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1),
        "warning",
        "1 of its 5 parameters are not the student's",
    ),
    "rate": (lambda s: torch.optim.SGD(s.parameters(), lr=0.0), "note", "its learning rate is 0"),
    "one_rate": (
        lambda s: torch.optim.SGD([{"params": s[0].parameters()}, {"params": s[2].parameters(), "lr": 0.0}], lr=0.1),
        "note",
        "group(s) 1 of the optimizer",
    ),
    "rule": (lambda s: torch.optim.Rprop(s.parameters()), "note", "(Rprop): inner='mirror' cannot follow Rprop"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    build, level, words = OPTIMIZERS[name]
    student = mlp(nn.Tanh()).double()
    optimizer = build(student)
    (finding,) = validate(student, optimizer)
    assert finding.level == level and words in str(finding)
    assert not validate(student, torch.optim.AdamW(student.parameters()))
    if name in ("missing", "another", "rule"):
        with pytest.raises(MetaKDError):
            balancer_of(student, optimizer)
        return
    with nullcontext() if level == "note" else pytest.warns(UserWarning, match=re.escape(words)):
        balancer = balancer_of(student, optimizer)
    balancer(batch_of(rows), batch_of(rows))
    assert (balancer.report.skipped is None) == (name != "rate")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_drops_other_units():
    student = mlp(nn.Tanh(), nn.Dropout(0.4))
    compiled = torch.compile(student, backend="eager")
    (finding,) = about(compiled, "drops other units")
    assert finding.level == "warning" and finding.where == "2 (Dropout)"
    assert not about(student, "drops") and not about(compiled.eval(), "drops")
    compiled.train()
    with import_module("torch._inductor.config").patch(fallback_random=True):
        assert not about(compiled, "drops")


def test_gated_cells_have_no_forward_mode_on_cuda(monkeypatch):
    student = LastState(nn.LSTM(4, 5))
    assert not about(student, "on CUDA")
    monkeypatch.setattr(nn.LSTM, "parameters", lambda self: [SimpleNamespace(is_cuda=True)])
    for estimator, level in ((None, "warning"), (ONCE["reverse"], "warning"), (ONCE["forward"], "error")):
        (finding,) = about(student, "on CUDA", estimator=estimator)
        assert finding.level == level and not finding.forward_mode


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_layers_of_cudnn_is_refused(kind, monkeypatch):
    student = LastState(kind(4, 5, num_layers=2, dropout=0.5))
    assert not about(student, "cuDNN's dropout")
    monkeypatch.setattr(kind, "parameters", lambda self: [SimpleNamespace(is_cuda=True)])
    (finding,) = about(student, "cuDNN's dropout")
    assert finding.level == "error"
    assert not about(student.eval(), "cuDNN's dropout")
    student.train().rnn.dropout = 0.0
    assert not about(student, "cuDNN's dropout")
    student.rnn.dropout = 0.5
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert not about(student, "cuDNN's dropout")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_gated_cells_on_a_cuda_device(cell):
    def on_device(size):
        return sequences(size).cuda()

    def build():
        return LastState(cell(4, 5, batch_first=True)).double().cuda()

    assert about(build(), "on CUDA")
    with pytest.raises(MetaKDError, match=r"but no forward mode\. Use reverse mode"):
        is_exact(build(), on_device, ONCE["forward"])


def test_errors_come_first_and_read_as_sentences():
    student = nn.Sequential(*(nn.LSTM(4, 4) for _ in range(5)), nn.BatchNorm1d(4), nn.EmbeddingBag(3, 4))
    student[1].requires_grad_(False)
    optimizer = torch.optim.SGD([*student[0].parameters(), nn.Parameter(torch.zeros(1))], lr=0.0)
    found = validate(student, optimizer)
    levels = [finding.level for finding in found]
    assert levels == sorted(levels, key=["error", "warning", "note"].index) and len(set(levels)) == 3
    assert found == validate(student, optimizer)
    assert about(student, "oneDNN")[0].where == "0, 1, 2 and 2 more (LSTM)"
    for finding in found:
        assert (
            str(finding).endswith(".") and "..." not in str(finding).replace(", ...)", "") and "  " not in str(finding)
        )


@pytest.mark.parametrize("name", [*ZOO, "lazy", "scripted"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.")
def test_nothing_is_run_and_nothing_is_changed(name):
    if name == "lazy":
        student = nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d())
    elif name == "scripted":
        student = torch.jit.script(mlp(nn.BatchNorm1d(6)))
    else:
        student = meet(name)[0]
    student.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was run")) if name != "scripted" else None
    optimizer = torch.optim.Adam(student.parameters())
    before, rng = state_of(student, optimizer), torch.get_rng_state()
    for estimator in (None, *ONCE.values(), estimators.Adjoint(), estimators.FiniteDifference()):
        found = validate(student, optimizer, estimator)
        assert name == "lazy" or not [finding for finding in found if finding.level == "error"]
    assert state_of(student, optimizer) == before and torch.equal(torch.get_rng_state(), rng)


def state_of(student, optimizer):
    tensors = [*student.parameters(), *student.buffers()]
    lazy = nn.parameter.is_lazy
    values = [(id(t), t._version, t.requires_grad, None if lazy(t) else t.tolist()) for t in tensors]
    return (
        values,
        [m.training for m in student.modules()],
        [p.grad for p in student.parameters()],
        dict(optimizer.state),
    )
