"""Students, optimizers and data that used to crash or to be refused: each against real steps of torch's optimizers."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torch.func import functional_call

from metakd import Batch, BilevelLossBalancer, MetaKDError, check_hypergradient, estimators, hypergradient
from metakd._basics.module_call import call
from metakd.check.finite_differences import derivative
from metakd.longtail._torchvision import import_torchvision
from metakd.terms import CrossEntropy, SoftTarget
from metakd.weighting import TermScalars
from tests.cases.real_steps import data

SMOOTH = CrossEntropy(label_smoothing=0.3)
TERMS = {"hard": CrossEntropy(), "smooth": SMOOTH}
Optimizer = torch.optim.Optimizer


class Case(NamedTuple):
    """A student as its user trains it."""

    student: nn.Module
    optimizers: Sequence[Optimizer]
    terms: dict[str, Any] = TERMS
    meta_loss: Any = CrossEntropy()


Build = Callable[[], Case]


def sgd(student: nn.Module, **options: Any) -> Case:
    return Case(student, [torch.optim.SGD(student.parameters(), lr=0.2)], **options)


def balanced(case: Case, **options: Any) -> BilevelLossBalancer:
    """A balancer whose weight model stands still; its gradient is the hypergradient."""
    weighting = TermScalars(len(case.terms)).double()
    return BilevelLossBalancer(
        case.student,
        case.terms,
        optimizer=case.optimizers,
        weighting=weighting,
        weighting_optimizer=torch.optim.SGD(weighting.parameters(), lr=0.0),
        meta_loss=case.meta_loss,
        **options,
    )


def descent(optimizers: Sequence[Optimizer], lr: float | None = None) -> list[Optimizer]:
    """Plain gradient descent at the optimizers' present learning rates, or at one of its own."""
    groups = [
        {"params": g["params"], "lr": g.get("lr") if lr is None else lr} for o in optimizers for g in o.param_groups
    ]
    return [torch.optim.SGD(groups)]


Steppers = Callable[[Sequence[Optimizer]], Sequence[Optimizer]]


def real_meta_loss(
    build: Build, weights: Sequence[Tensor], batches: Sequence[Batch], meta_batch: Batch, steppers: Steppers
) -> Tensor:
    """The meta loss after one real step a batch on its weighted losses."""
    case = build()
    moving = steppers(case.optimizers)
    for w, batch in zip(weights, batches, strict=True):
        outputs = call(case.student, batch.inputs)
        losses = torch.stack([term(outputs, batch) for term in case.terms.values()], dim=1)
        case.student.zero_grad()
        ((w * losses).sum() / len(losses)).backward()
        for optimizer in moving:
            optimizer.step()
    return case.meta_loss(call(case.student, meta_batch.inputs), meta_batch).detach().mean()


def training_data(steps: int) -> tuple[list[Batch], Batch]:
    return [data(seed=seed)[0] for seed in range(steps)], data()[1]


def assert_right(
    build: Build,
    steps: int = 1,
    *,
    inner: Any = "sgd",
    estimator: Any = None,
    steppers: Steppers | None = None,
    given: tuple[list[Batch], Batch] | None = None,
    tolerance: float = 1e-6,
) -> BilevelLossBalancer:
    """A balancer's influence, or hypergradient through several steps, is the meta loss's slope after real steps."""
    batches, meta_batch = given or training_data(steps)
    moving = steppers or (descent if inner == "sgd" else tuple)
    estimator = estimator or (estimators.OneStep() if steps == 1 else estimators.Adjoint())
    balancer = balanced(build(), inner=inner, estimator=estimator)
    if steps == 1:
        balancer(batches[0], meta_batch)
        start, slope = balancer.report.weights, balancer.report.influence / len(balancer.report.weights)
    else:
        balancer.meta_step(batches, meta_batch)
        start, slope = balancer.weighting.free.detach().clone(), balancer.weighting.free.grad
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)

        def along(h: float, direction: Tensor = direction) -> float:
            moved = start + h * direction
            weights = [moved if steps == 1 else F.softplus(moved).expand(1, -1)] * steps
            return float(real_meta_loss(build, weights, batches, meta_batch, moving))

        expected, found = derivative(along, step=1e-2, rows=6), float((slope * direction).sum())
        assert abs(expected) > 1e-7
        assert abs(found - expected) <= tolerance * abs(expected), (found, expected)
    return balancer


def seeded(kind: Callable[[], nn.Module], dtype: torch.dtype | None = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return kind().to(dtype)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


# 10. Outputs and inputs of a type of their own: it is kept, in the check and with students in half precision.


class Output(OrderedDict):
    """As the outputs of Hugging Face's models: a mapping whose items are attributes as well."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        for name, item in items.items():
            super().__setattr__(name, item)


class Graphs:
    """As the batches of libraries for graphs: no container, only attributes."""

    __slots__ = ("edges", "features")

    def __init__(self, features: Tensor, edges: Tensor) -> None:
        self.features, self.edges = features, edges


class Speaking(nn.Module):
    """Answers with an `Output`, or with the class of such outputs that it is given."""

    def __init__(self, kind: Any = Output) -> None:
        super().__init__()
        self.net, self.kind = mlp(), kind

    def forward(self, x: Tensor) -> Any:
        z = self.net(x)
        return self.kind(logits=z, hidden_states=(z.tanh(), z.sin()))


def kinds_of_output() -> list[Any]:
    try:
        from transformers.modeling_outputs import SequenceClassifierOutput
    except ImportError:
        return [Output]
    return [Output, SequenceClassifierOutput]


def typed_terms(kind: Any) -> dict[str, Any]:
    def soft(outputs: Any, batch: Batch) -> Tensor:
        assert type(outputs) is kind and type(batch.teacher) is kind
        assert batch.teacher["logits"] is batch.teacher.logits
        return SoftTarget(temperature=2.0)(outputs, batch)

    def hint(outputs: Any, batch: Batch) -> Tensor:
        states = zip(outputs.hidden_states, batch.teacher.hidden_states, strict=True)
        return sum((mine - other).square().mean(1) for mine, other in states)

    return {"hard": CrossEntropy(), "soft": soft, "hint": hint}


def speaking(kind: Any, dtype: torch.dtype) -> tuple[BilevelLossBalancer, list[Batch]]:
    student, teacher = seeded(lambda: Speaking(kind), dtype), Speaking(kind).to(dtype)
    batches = [batch._replace(inputs=batch.inputs.to(dtype)) for batch in data()]
    weighting = TermScalars(3)
    balancer = BilevelLossBalancer(
        student,
        typed_terms(kind),
        optimizer=torch.optim.SGD(student.parameters(), lr=0.2),
        teacher=teacher,
        weighting=weighting,
        weighting_optimizer=torch.optim.SGD(weighting.parameters(), lr=0.0),
        meta_loss=typed_terms(kind)["soft"],
    )
    return balancer, batches


@pytest.mark.parametrize("kind", kinds_of_output())
def test_outputs_keep_their_type_in_the_check(kind):
    balancer, (batch, meta_batch) = speaking(kind, torch.float32)
    balancer(batch, meta_batch)
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")
    assert check_hypergradient(
        balancer, [batch, meta_batch], meta_batch, estimator=estimators.Adjoint()
    ).verdict.startswith("exact")


@pytest.mark.parametrize("kind", kinds_of_output())
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_outputs_keep_their_type_with_a_student_in_half_precision(kind, half):
    balancer, (batch, meta_batch) = speaking(kind, half)
    exact, _ = speaking(kind, torch.float32)
    exact.student.load_state_dict(balancer.student.state_dict())
    exact.teacher.load_state_dict(balancer.teacher.state_dict())
    for each in (balancer, exact):
        own = next(each.student.parameters()).dtype
        each(*(b._replace(inputs=b.inputs.to(own)) for b in (batch, meta_batch)))
    found, expected = balancer.report.influence, exact.report.influence
    assert (found - expected).norm() < 0.03 * expected.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.meta_step([batch], meta_batch)
        hypergradients = [each.weighting.free.grad.clone() for each in (balancer,)]
    exact.meta_step(
        [batch._replace(inputs=batch.inputs.float())], meta_batch._replace(inputs=meta_batch.inputs.float())
    )
    torch.testing.assert_close(hypergradients[0], exact.weighting.free.grad, rtol=0.03, atol=1e-4)
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


class OnGraphs(nn.Module):
    """Sums over neighbours; a sample is a node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, graphs: Graphs) -> Tensor:
        h = torch.tanh(self.first(graphs.features))
        source, target = graphs.edges
        return self.second(h.index_add(0, target, h[source]))


def graphs(dtype: torch.dtype) -> tuple[Batch, Batch]:
    def graph(batch: Batch) -> Batch:
        n = len(batch.targets)
        edges = torch.stack([torch.arange(n), torch.arange(n).roll(2)])
        return Batch(Graphs(batch.inputs.to(dtype), edges), batch.targets)

    batch, meta_batch = data()
    return graph(batch), graph(meta_batch)


def test_inputs_of_a_type_of_their_own():
    batch, meta_batch = graphs(torch.float64)
    assert_right(lambda: sgd(seeded(OnGraphs)), given=([batch], meta_batch))
    assert_right(lambda: sgd(seeded(OnGraphs)), 2, given=([batch, meta_batch], meta_batch))
    balancer, (batch, meta_batch) = balanced(sgd(seeded(OnGraphs, torch.float32))), graphs(torch.float32)
    for batches in ([batch], [batch, batch]):
        found = check_hypergradient(balancer, batches, meta_batch, estimator=estimators.Adjoint())
        assert found.verdict.startswith("exact")
    assert batch.inputs.features.dtype == torch.float32


# 11. Sparse gradients, sparse matrices in the student, sparse inputs.


class Words(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module] = nn.Embedding) -> None:
        super().__init__()
        self.words, self.head = layer(7, 6, sparse=True), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        found = self.words(x.mul(2).long().clamp(-3, 3) + 3)
        return self.head(found.sum(1) if found.ndim == 3 else found)


def words(layer: Any = nn.Embedding, kind: Any = None, **options: Any) -> Build:
    def build() -> Case:
        student = seeded(lambda: Words(layer))
        if kind is None:
            return Case(student, [torch.optim.SGD(student.parameters(), lr=0.2, **options)])
        matrix = kind(student.words.parameters(), lr=0.05)
        return Case(student, [matrix, torch.optim.AdamW(student.head.parameters(), lr=0.1)])

    return build


@pytest.mark.parametrize("estimator", [estimators.OneStep("forward"), estimators.OneStep("reverse")])
def test_sparse_gradients(estimator):
    assert_right(words(), estimator=estimator)
    assert_right(words(kind=torch.optim.SparseAdam), estimator=estimator)
    assert_right(words(), inner="mirror", estimator=estimator)


def test_bags_have_finite_differences_alone():
    with pytest.raises(MetaKDError, match=r"words \(EmbeddingBag\): .*FiniteDifference\(\)"):
        balanced(words(nn.EmbeddingBag)())
    for kind in (None, torch.optim.SparseAdam):
        assert_right(words(nn.EmbeddingBag, kind), estimator=estimators.FiniteDifference(), tolerance=1e-4)


@pytest.mark.parametrize("estimator", [estimators.Adjoint(), estimators.Unroll()])
def test_sparse_gradients_over_several_steps(estimator):
    assert_right(words(kind=torch.optim.SparseAdam), 2, estimator=estimator)
    assert_right(words(), 2, inner="mirror", estimator=estimator)


def test_a_mirror_of_sparse_adam_is_refused_by_name():
    with pytest.raises(MetaKDError, match=r"cannot follow SparseAdam.*inner='sgd'"):
        balanced(words(kind=torch.optim.SparseAdam)(), inner="mirror")


def test_the_students_own_gradient_stays_sparse():
    case = words(kind=torch.optim.SparseAdam)()
    balancer, ((batch,), meta_batch) = balanced(case, accumulate=9), training_data(1)
    loss = balancer(batch, meta_batch)
    loss.backward()
    assert case.student.words.weight.grad.is_sparse
    outputs = case.student(batch.inputs)
    losses = torch.stack([term(outputs, batch) for term in TERMS.values()], dim=1)
    (expected,) = torch.autograd.grad((balancer.report.weights * losses).sum() / 5, [case.student.words.weight])
    torch.testing.assert_close(case.student.words.weight.grad.to_dense(), expected.to_dense())
    for optimizer in case.optimizers:
        optimizer.step()


LAYOUTS = {"coo": lambda t: t.to_sparse(), "csr": lambda t: t.to_sparse_csr()}
PRODUCTS = {"matmul": torch.matmul, "sparse.mm": torch.sparse.mm, "operator": lambda a, b: a @ b}


def in_layout(t: Tensor, layout: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is in beta
        return LAYOUTS[layout](t)


class OnAMatrix(nn.Module):
    """A graph network whose normalised adjacency is a sparse buffer; its inputs are the numbers of nodes."""

    def __init__(self, layout: str, product: str, *, buffer: bool = True) -> None:
        super().__init__()
        drawn = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        adjacency = in_layout(drawn * (drawn > 0.3), layout)
        self.product = PRODUCTS[product]
        if buffer:
            self.register_buffer("adjacency", adjacency)
        else:
            self.adjacency = adjacency
        self.register_buffer("features", torch.randn(9, 4, dtype=torch.float64))
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

    def forward(self, nodes: Tensor) -> Tensor:
        h = torch.tanh(self.product(self.adjacency, self.first(self.features)))
        return self.second(self.product(self.adjacency, h))[nodes]


NODES = [Batch(torch.arange(5), data()[0].targets)], Batch(torch.arange(3, 9), data()[1].targets)


@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_with_a_sparse_matrix_of_the_student(layout, product, buffer):
    def build() -> Case:
        torch.manual_seed(1)
        return sgd(OnAMatrix(layout, product, buffer=buffer))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reverse mode takes its place")
        for estimator in (estimators.OneStep(), estimators.OneStep("reverse")):
            balancer = assert_right(build, given=NODES, estimator=estimator)
        assert balancer.student.adjacency.layout == in_layout(torch.eye(2), layout).layout
        (batch,), meta_batch = NODES
        for estimator in (estimators.Adjoint(), estimators.Unroll()):
            assert_right(build, 2, given=([batch, meta_batch], meta_batch), estimator=estimator)
        assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


class BagOfWords(nn.Module):
    def __init__(self, product: str) -> None:
        super().__init__()
        self.product, self.first, self.head = PRODUCTS[product], nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.product(x, self.first)))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_inputs(layout, product):
    batch, meta_batch = (Batch(in_layout(b.inputs * (b.inputs > -0.3), layout), b.targets) for b in data())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reverse mode takes its place")
        build = lambda: sgd(seeded(lambda: BagOfWords(product)))  # noqa: E731
        for estimator in (estimators.OneStep(), estimators.OneStep("reverse")):
            balancer = assert_right(build, given=([batch], meta_batch), estimator=estimator)
        assert_right(build, 2, given=([batch, meta_batch], meta_batch))
        assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_products_in_hypergradient(layout):
    batch, meta_batch = data()
    x = in_layout(batch.inputs, layout)
    params = {"w": torch.randn(4, 3, dtype=torch.float64)}
    phi = {"weights": torch.ones(5, dtype=torch.float64), "decay": torch.tensor(0.1, dtype=torch.float64)}

    def inner(p, m, b):
        losses = F.cross_entropy(x @ p["w"], batch.targets, reduction="none")
        return (m["weights"] * losses).mean() + m["decay"] * p["w"].square().sum()

    def outer(p, m):
        return F.cross_entropy(meta_batch.inputs @ p["w"], meta_batch.targets)

    at = (inner, outer, params, phi, range(3))
    for estimator in (estimators.Adjoint(), estimators.Unroll()):
        found = check_hypergradient(*at, optimizer=torchopt.sgd(lr=0.3), estimator=estimator)
        assert found.verdict.startswith("exact")
        assert hypergradient(*at, optimizer=torchopt.sgd(lr=0.3), estimator=estimator, verify=True).params_gradient


# 12. Complex parameters.


class Spectral(nn.Module):
    """Mixes frequencies by complex weights; the outputs are real."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 5, dtype=torch.complex128))
        self.shift = nn.Parameter(torch.randn((), dtype=torch.complex128))
        self.head = nn.Linear(10, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.fft(x) @ self.mix + self.shift
        return self.head(torch.cat([z.real.tanh(), (z * z.conj()).real.sqrt()], dim=1))


def spectral(kind: Any = torch.optim.SGD, warm: int = 0, **options: Any) -> Build:
    def build() -> Case:
        torch.manual_seed(1)
        student = Spectral()
        optimizer = kind(student.parameters(), lr=0.05, **options)
        for batch in training_data(warm)[0]:
            F.cross_entropy(student(batch.inputs), batch.targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        return Case(student, [optimizer])

    return build


@pytest.mark.parametrize("mode", ["forward", "reverse", "auto"])
def test_complex_parameters(mode):
    balancer = assert_right(spectral(), estimator=estimators.OneStep(mode))
    assert balancer.student.mix.dtype == torch.complex128
    assert_right(spectral(), estimator=estimators.FiniteDifference(), tolerance=1e-4)


ESTIMATORS = [estimators.Adjoint(), estimators.Unroll()]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_complex_parameters_over_several_steps(estimator):
    assert_right(spectral(), estimator=estimator)
    assert_right(spectral(), 2, estimator=estimator)


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"weight_decay": 0.1, "eps": 0.01}),
        (torch.optim.AdamW, {"amsgrad": True, "eps": 0.01}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_a_mirror_of_complex_parameters(kind, options, warm):
    build = spectral(kind, warm, **options)
    for estimator in (estimators.OneStep("forward"), estimators.OneStep("reverse"), *ESTIMATORS):
        assert_right(build, inner="mirror", estimator=estimator)
    for estimator in ESTIMATORS:
        assert_right(build, 2, inner="mirror", estimator=estimator)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_the_default_weight_model_beside_complex_parameters_is_real(dtype):
    real = dtype.to_real()
    torch.manual_seed(1)
    student = Spectral()
    for module in student.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().to(dtype if p.is_complex() else real))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    balancer = BilevelLossBalancer(student, TERMS, optimizer=optimizer, inner="mirror")
    assert {p.dtype for p in balancer.weighting.parameters()} == {real}
    batch, meta_batch = (b._replace(inputs=b.inputs.to(real)) for b in data())
    before = student.mix.detach().clone()
    balancer(batch, meta_batch).backward()
    assert balancer.report.weights.dtype == real and balancer.report.influence.dtype == real
    optimizer.step()
    assert not torch.equal(student.mix, before)
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")
    assert check_hypergradient(balancer, [batch, batch], meta_batch, estimator=estimators.Adjoint()).verdict.startswith(
        "exact"
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_in_a_check_of_two_functions(dtype, estimator):
    """The check casts them to double precision, as it does real ones."""
    x, y = torch.randn(6, 4, dtype=dtype), torch.randn(6, dtype=dtype.to_real())
    params = {"w": torch.randn(4, dtype=dtype)}
    phi = {"weights": torch.ones(6, dtype=dtype.to_real()), "scale": torch.randn(4, dtype=dtype)}

    def inner(p, m, batch):
        return (m["weights"] * (batch @ (p["w"] * m["scale"]) - y).abs().square()).mean()

    def outer(p, m):
        return ((x.to(p["w"].dtype) @ p["w"]).real - y).square().mean()

    at = (inner, outer, params, phi, [x] * 3)
    for optimizer in (torchopt.sgd(lr=0.1), torchopt.adam(lr=0.1)):
        assert check_hypergradient(*at, optimizer=optimizer, estimator=estimator).verdict.startswith("exact")
        found = hypergradient(*at, optimizer=optimizer, estimator=estimator, verify=True)
        assert {name: g.dtype for name, g in found.gradient.items()} == {name: t.dtype for name, t in phi.items()}


# 13. Buffers that change their shape in a forward pass.


class Observed(nn.Module):
    """Scales by the range that it has seen, which is empty at first, as observers of quantisation keep it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.net = how, mlp()
        self.register_buffer("high", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        seen = x.amax(0)
        high = seen if self.high.numel() == 0 else torch.maximum(self.high, seen) + 0.1 * self.high
        if self.how == "resized":
            self.high.resize_(high.shape)
            self.high.copy_(high)
        elif self.how == "replaced":
            self.high = high
        else:
            self.high.data = high
        return self.net(x / (1 + self.high.abs()))


WAYS = ["resized", "replaced", "data"]


def observed(how: str, *, warm: bool = False) -> Build:
    def build() -> Case:
        case = sgd(seeded(lambda: Observed(how)))
        if warm:
            case.student(data(seed=7)[0].inputs)
        return case

    return build


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_a_buffer_that_changes_its_shape(how, warm):
    balancer = assert_right(observed(how, warm=warm))
    expected = observed(how, warm=warm)().student
    expected(data()[0].inputs)
    assert torch.equal(balancer.student.high, expected.high)  # as after the one pass
    for estimator in ESTIMATORS:
        balancer = assert_right(observed(how, warm=warm), 2, estimator=estimator)
        assert balancer.student.high.numel() == (4 if warm else 0)
    assert check_hypergradient(balancer, [data()[0]], data()[1]).verdict.startswith("exact")


class Typo(Exception):
    pass


@pytest.mark.parametrize("place", ["hard", "meta_loss"])
@pytest.mark.parametrize("how", WAYS)
def test_an_error_after_a_buffer_has_changed_its_shape_is_the_real_one(how, place):
    def broken(outputs: Tensor, batch: Batch) -> Tensor:
        raise Typo("logits is not defined")

    case = observed(how)()
    case = case._replace(meta_loss=broken) if place == "meta_loss" else case._replace(terms={"hard": broken})
    balancer, (batch, meta_batch) = balanced(case), data()
    buffer = case.student.high
    state = {name: value.clone() for name, value in case.student.state_dict().items()}
    steps = [lambda: balancer(batch, meta_batch), lambda: balancer.meta_step([batch], meta_batch)]
    for step in steps:
        with pytest.raises(MetaKDError, match=f"{place}.*Typo: logits is not defined") as caught:
            step()
        assert isinstance(caught.value.__cause__, Typo) or isinstance(caught.value.__cause__.__cause__, Typo)
        assert case.student.high is buffer and buffer.shape == (0,)
        for name, value in case.student.state_dict().items():
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("observer", ["MovingAveragePerChannelMinMaxObserver", "MovingAverageMinMaxObserver"])
def test_observers_of_quantisation(observer):
    """Fake quantisation is a straight-through estimator: the reference is a graph of the step."""
    quantization = pytest.importorskip("torch.ao.quantization")

    def fake() -> nn.Module:
        options = {"ch_axis": 1} if "Channel" in observer else {}
        return quantization.FakeQuantize(
            getattr(quantization, observer),
            quant_min=0,
            quant_max=255,
            dtype=torch.quint8,
            qscheme=torch.per_channel_affine if options else torch.per_tensor_affine,
            **options,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to move it elsewhere
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(4, 6), fake(), nn.Tanh(), nn.Linear(6, 3))
        batch, meta_batch = (b._replace(inputs=b.inputs.float()) for b in data())
        balancer = balanced(sgd(student))
        balancer(batch, meta_batch)
        found, buffers = balancer.report.influence, {name: b.clone() for name, b in student.named_buffers()}
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(4, 6), fake(), nn.Tanh(), nn.Linear(6, 3))
        weights = balancer.report.weights.clone().requires_grad_()
        params = dict(student.named_parameters())
        outputs = student(batch.inputs)
        for name, buffer in student.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
        losses = torch.stack([term(outputs, batch) for term in TERMS.values()], dim=1)
        steps = torch.autograd.grad((weights * losses).sum() / 5, list(params.values()), create_graph=True)
        ahead = {name: p - 0.2 * g for (name, p), g in zip(params.items(), steps, strict=True)}
        meta = CrossEntropy()(functional_call(student, ahead, meta_batch.inputs), meta_batch).mean()
        torch.testing.assert_close(found, torch.autograd.grad(meta, weights)[0] * 5, rtol=1e-4, atol=1e-6)


# 14. Optimizers without a learning rate, and several of them.


class OwnRate(torch.optim.Optimizer):
    """As Hugging Face's Adafactor, which finds its own learning rate."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("options", "found"), [({"lr": None}, "lr=None"), ({"eps": 1e-3}, "no 'lr'")])
def test_an_optimizer_without_a_learning_rate(options, found):
    def build() -> Case:
        student = seeded(mlp)
        return Case(student, [OwnRate(student.parameters(), **options)])

    with pytest.raises(MetaKDError, match=rf"group 0 of OwnRate has {found}, .*inner="):
        balanced(build())
    inner = torchopt.sgd(lr=0.3)
    for steps in (1, 2):
        balancer = assert_right(build, steps, inner=inner, steppers=lambda optimizers: descent(optimizers, lr=0.3))
    batch, meta_batch = data()
    balancer(batch, meta_batch)
    assert balancer.report.influence.any()


def iteration_in_float64(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
    """Newton and Schulz's iteration as torch.optim.Muon writes it, but without rounding to bfloat16."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


def with_muon(warm: int = 0, warm_up: bool = False) -> Build:
    """Muon for the matrices and AdamW for the rest; Muon's scheduler begins with 0, if asked for."""

    def build() -> Case:
        student = seeded(mlp)
        muon = torch.optim.Muon([p for p in student.parameters() if p.ndim == 2], lr=0.1, weight_decay=0.1)
        adamw = torch.optim.AdamW([p for p in student.parameters() if p.ndim < 2], lr=0.05, eps=0.01)
        if warm_up:
            torch.optim.lr_scheduler.LambdaLR(muon, lambda epoch: float(epoch > 0))
        for batch in training_data(warm)[0]:
            F.cross_entropy(student(batch.inputs), batch.targets).backward()
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad()
        return Case(student, [muon, adamw])

    return build


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@needs_muon
@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("inner", ["sgd", "mirror"])
def test_muon_beside_adamw(inner, warm, warm_up, monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iteration_in_float64)
    build = with_muon(warm, warm_up)
    for estimator in (estimators.OneStep("forward"), estimators.OneStep("reverse"), *ESTIMATORS):
        assert_right(build, inner=inner, estimator=estimator)
    for estimator in ESTIMATORS:
        assert_right(build, 2, inner=inner, estimator=estimator)


@needs_muon
def test_the_mirror_of_muon_forecasts_the_real_step():
    batch, meta_batch = data()
    balancer = balanced(with_muon(2)(), inner="mirror")
    balancer(batch, meta_batch)
    real = real_meta_loss(with_muon(2), [balancer.report.weights], [batch], meta_batch, tuple)
    torch.testing.assert_close(balancer.report.meta_loss, real, rtol=1e-3, atol=1e-3)  # torch rounds to bfloat16


@needs_muon
@pytest.mark.parametrize("inner", ["sgd", "mirror"])
def test_a_warm_up_from_zero_of_one_of_two_optimizers(inner, monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iteration_in_float64)
    case = with_muon()()
    muon, adamw = case.optimizers
    scheduler = torch.optim.lr_scheduler.LambdaLR(muon, lambda epoch: 0.5 * epoch)
    balancer, (batch, meta_batch) = balanced(case, inner=inner), data()
    influences = []
    for epoch in range(3):
        assert muon.param_groups[0]["lr"] == 0.05 * epoch
        loss = balancer(batch, meta_batch)
        influences.append(balancer.report.influence)
        assert balancer.report.skipped is None and influences[-1].any()
        for optimizer in case.optimizers:
            optimizer.zero_grad()
        loss.backward()
        before = case.student[0].weight.detach().clone()
        for optimizer in case.optimizers:
            optimizer.step()
        real = CrossEntropy()(case.student(meta_batch.inputs), meta_batch).detach().mean()
        assert torch.equal(before, case.student[0].weight) == (epoch == 0)
        if inner == "mirror":
            torch.testing.assert_close(balancer.report.meta_loss, real, rtol=1e-9, atol=1e-9)
        scheduler.step()
    adamw.param_groups[0]["lr"] = muon.param_groups[0]["lr"] = 0.0
    balancer(batch, meta_batch)
    assert "learning rate is 0" in balancer.report.skipped


# 19. Deep networks at few samples: a kink is told from a fault.


def double_backward(balancer: BilevelLossBalancer, batch: Batch, meta_batch: Batch, lr: float) -> Tensor:
    """The gradient in TermScalars' free numbers by a graph of the step."""
    student, free = balancer.student, balancer.weighting.free
    params = dict(student.named_parameters())
    outputs = student(batch.inputs)
    losses = torch.stack([term(outputs, batch) for term in balancer.terms.values()], dim=1)
    loss = (F.softplus(free) * losses).sum() / len(losses)
    steps = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    ahead = {name: p - lr * g for (name, p), g in zip(params.items(), steps, strict=True)}
    meta = CrossEntropy()(functional_call(student, ahead, meta_batch.inputs), meta_batch).mean()
    (found,) = torch.autograd.grad(meta, free)
    return found


DEEP = [("resnet18", 0.01), ("shufflenet_v2_x0_5", 0.1), ("shufflenet_v2_x0_5", 0.01), ("squeezenet1_1", 0.01)]


def deep(name: str, lr: float) -> tuple[BilevelLossBalancer, Batch, Batch]:
    import_torchvision()
    from torchvision import models

    torch.manual_seed(0)
    student = getattr(models, name)(num_classes=3).double()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    batch, meta_batch = (Batch(x, torch.arange(4) % 3) for x in images)
    return balanced(Case(student, [torch.optim.SGD(student.parameters(), lr=lr)])), batch, meta_batch


@pytest.mark.parametrize(("name", "lr"), DEEP)
def test_a_deep_network_at_few_samples_is_exact_or_near_a_kink(name, lr):
    balancer, batch, meta_batch = deep(name, lr)
    state = copy.deepcopy(balancer.student.state_dict())
    balancer(batch, meta_batch)
    found = balancer.weighting.free.grad.clone()
    balancer.student.load_state_dict(state)
    torch.testing.assert_close(found, double_backward(balancer, batch, meta_batch, lr), rtol=1e-7, atol=1e-12)
    balancer.student.load_state_dict(state)
    try:
        assert check_hypergradient(balancer, [batch], meta_batch, directions=1).verdict.startswith("exact")
    except MetaKDError as error:
        said = str(error)
        assert "kink" in said and "stop-gradient" not in said and "backward is wrong" not in said
        assert "there is no derivative here" not in said  # there is: a double backward has just given it


class Bent(estimators.OneStep):
    """Wrong by a tenth or two, and not by the same factor everywhere."""

    def __call__(self, problem: Any) -> Any:
        found = super().__call__(problem)
        bent = {key: g * torch.linspace(0.8, 1.1, g.numel()).to(g).view_as(g) for key, g in found.gradient.items()}
        return found._replace(gradient=bent)


@pytest.mark.parametrize(("name", "lr"), DEEP[1:])
def test_a_fault_in_a_deep_network_is_called_a_fault(name, lr):
    balancer, batch, meta_batch = deep(name, lr)
    with pytest.raises(MetaKDError, match="differs from central finite differences") as caught:
        check_hypergradient(balancer, [batch], meta_batch, estimator=Bent(), directions=2)
    assert "a kink" not in str(caught.value) and "kinks close by" not in str(caught.value)
