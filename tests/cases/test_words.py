"""What a user meets at the edges: teachers, targets and losses of every kind, and what messages advise."""

import copy
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils import checkpoint

from metakd import Batch, BilevelLossBalancer, MetaKDError, check_hypergradient, estimators
from metakd.terms import CrossEntropy, SoftTarget
from tests.cases.real_optimizers import Case, assert_right, balanced, mlp, seeded, sgd
from tests.cases.real_steps import data

MODES = [estimators.OneStep("forward"), estimators.OneStep("reverse")]


def plain(student: nn.Module, terms: Any, **options: Any) -> BilevelLossBalancer:
    return BilevelLossBalancer(student, terms, optimizer=torch.optim.SGD(student.parameters(), lr=0.2), **options)


# 15. Teachers: a list, a function, an exported or a frozen scripted module.


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()


def frozen() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripts are deprecated
        return torch.jit.freeze(torch.jit.script(network().eval()))


def exported() -> Any:
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    return torch.export.export(network().eval(), (data()[0].inputs,), dynamic_shapes=sizes).module()


def first_soft(outputs: Tensor, batch: Batch) -> Tensor:
    return SoftTarget(temperature=2.0)(outputs, batch._replace(teacher=batch.teacher[0]))


def second_soft(outputs: Tensor, batch: Batch) -> Tensor:
    return SoftTarget(temperature=3.0)(outputs, batch._replace(teacher=batch.teacher[1]))


ONE = {"hard": CrossEntropy(), "soft": SoftTarget(temperature=2.0)}
EACH = {"hard": CrossEntropy(), "first": first_soft, "second": second_soft}


def by_hand(x: Tensor) -> Tensor:
    return network().eval()(x).detach()


def bent(x: Tensor) -> Tensor:
    return x[:, :3].sin()


TEACHERS = {
    "module": (network, by_hand, ONE),
    "function": (lambda: bent, bent, ONE),
    "frozen": (frozen, by_hand, ONE),
    "exported": (exported, by_hand, ONE),
    "list": (lambda: [network(), bent], lambda x: [by_hand(x), bent(x)], EACH),
    "modules": (lambda: nn.ModuleList([network(), network()]), lambda x: [by_hand(x), by_hand(x)], EACH),
    "all kinds": (lambda: (exported(), frozen()), lambda x: [by_hand(x), by_hand(x)], EACH),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_of_any_kind_teaches_right(kind):
    build, answers, terms = TEACHERS[kind]
    known = [b._replace(teacher=answers(b.inputs)) for b in data()]

    def case() -> Case:
        return sgd(seeded(mlp), terms=terms)

    expected = assert_right(case, given=(known[:1], known[1])).report
    balancer = balanced(case(), teacher=build(), features=lambda losses, outputs, batch: losses)
    batch, meta_batch = data()
    balancer(batch, meta_batch)
    torch.testing.assert_close(balancer.report.influence, expected.influence)
    torch.testing.assert_close(balancer.report.losses, expected.losses)
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (nn.Linear, r"teacher is the class Linear, not an object of it; write Linear"),
        ("resnet56", r"teacher is of type str; a teacher is an nn\.Module or any other callable"),
        ({"a": nn.Linear(4, 3)}, r"teacher is of type dict; .* sequence of these: an ensemble"),
        ([nn.Linear(4, 3), None], r"teacher\[1\] is of type NoneType"),
        ([], r"teacher is an empty list"),
    ],
)
def test_what_is_no_teacher_is_refused_at_construction(teacher, words):
    with pytest.raises(MetaKDError, match=words):
        plain(nn.Linear(4, 3), ONE, teacher=teacher)


def test_an_exported_program_is_told_to_give_its_module():
    program = torch.export.export(network().eval(), (data()[0].inputs,))
    with pytest.raises(MetaKDError, match=r"teacher is an ExportedProgram, .*program\.module\(\)"):
        plain(nn.Linear(4, 3), ONE, teacher=program)


def test_an_ensemble_where_one_teacher_is_expected():
    balancer, (batch, meta_batch) = plain(seeded(mlp), ONE, teacher=[network(), bent]), data()
    with pytest.raises(MetaKDError, match=r"list of 2 outputs \(an ensemble .*(batch\.teacher|features=)"):
        balancer(batch, meta_batch)


# 16. Students that are no classifiers, and the default meta loss.


def mean_square(outputs: Tensor, batch: Batch) -> Tensor:
    return (outputs - batch.targets).square().flatten(1).mean(1)


def yes_or_no(outputs: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.flatten(), batch.targets.double(), reduction="none")


def several_labels(outputs: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, batch.targets, reduction="none").mean(1)


def every_pixel(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch.targets, reduction="none").flatten(1).mean(1)


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(-1, 1, 2, 2))


def drawn(kind: str, size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, dtype=torch.float64, generator=generator)
    targets = {
        "regression": lambda: torch.randn(size, 3, dtype=torch.float64, generator=generator),
        "one number": lambda: torch.randn(size, 1, dtype=torch.float64, generator=generator),
        "several labels": lambda: torch.randint(2, (size, 3), generator=generator).double(),
        "soft labels": lambda: torch.rand(size, 3, dtype=torch.float64, generator=generator).softmax(1),
        "single logit": lambda: torch.randint(2, (size,), generator=generator),
        "dense": lambda: torch.randint(3, (size, 2, 2), generator=generator),
    }
    return Batch(x, targets[kind]())


def one_output() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


STUDENTS = {
    "regression": (mlp, mean_square, r"regression or several labels .*F\.mse_loss"),
    "one number": (one_output, mean_square, r"single logit"),
    "several labels": (mlp, several_labels, r"several labels"),
    "soft labels": (mlp, mean_square, r"soft labels"),
    "single logit": (one_output, yes_or_no, r"binary_cross_entropy_with_logits"),
    "dense": (Pixels, every_pixel, r"one class per pixel, .*F\.cross_entropy"),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_default_meta_loss_names_the_way_to_another(kind):
    student, term, words = STUDENTS[kind]
    batch, meta_batch = drawn(kind, 5, 0), drawn(kind, 6, 1)
    balancer = plain(seeded(student), {"own": term})
    for step in (lambda: balancer(batch, meta_batch), lambda: balancer.meta_step([batch], meta_batch)):
        with pytest.raises(MetaKDError, match=rf"(?s)'meta_loss'.*{words}.*meta_loss=lambda outputs, batch"):
            step()
    terms = {"own": term, "size": lambda outputs, batch: outputs.square().flatten(1).mean(1)}

    def case() -> Case:
        return sgd(seeded(student), terms=terms, meta_loss=term)

    assert_right(case, given=([batch], meta_batch))
    assert_right(case, 2, given=([batch, meta_batch], meta_batch))
    balancer = plain(seeded(student), {"own": term}, meta_loss=term)  # with the default weight model
    balancer(batch, meta_batch).backward()
    assert check_hypergradient(balancer, [batch], meta_batch, directions=1).verdict.startswith("exact")


@pytest.mark.parametrize("kind", ["regression", "several labels", "dense"])
def test_the_default_features_beside_a_teacher_name_the_way_to_others(kind):
    student, term, _ = STUDENTS[kind]
    batch, meta_batch = drawn(kind, 5, 0), drawn(kind, 6, 1)
    options = {"teacher": seeded(student), "meta_loss": term}
    with pytest.raises(MetaKDError, match=r"the default features .*features=lambda losses, outputs, batch: losses"):
        plain(seeded(student), {"own": term}, **options)(batch, meta_batch)
    balancer = plain(seeded(student), {"own": term}, features=lambda losses, outputs, batch: losses, **options)
    balancer(batch, meta_batch)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.first(x) * self.second(other).tanh()


def paired(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.inputs, batch.inputs.sin(), batch.targets


@pytest.mark.parametrize("convert", [lambda y: y, lambda y: y.double(), lambda y: F.one_hot(y, 3)])
def test_items_of_two_inputs_and_their_targets(convert):
    batch, meta_batch = ((x, other, convert(y)) for x, other, y in map(paired, data()))
    balancer = plain(seeded(Two), [CrossEntropy()])
    for step in (lambda: balancer(batch, meta_batch), lambda: balancer.meta_step([batch], meta_batch)):
        with pytest.raises(MetaKDError, match=r"batch_fn=.*positions in the training set|positions in the.*batch_fn="):
            step()


def test_two_inputs_by_batch_fn():
    pairs = [Batch((x, other), y) for x, other, y in map(paired, data())]
    expected = assert_right(lambda: sgd(seeded(Two)), given=(pairs[:1], pairs[1])).report.influence
    balancer = balanced(sgd(seeded(Two)), batch_fn=lambda item: Batch(inputs=(item[0], item[1]), targets=item[2]))
    balancer(*map(paired, data()))
    torch.testing.assert_close(balancer.report.influence, expected)


# 17. Batches whose size nothing plain tells: detection, CTC, packed sequences.


class Detector(nn.Module):
    """A box for each image, which may come as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, images: Any) -> Tensor:
        if isinstance(images, list):
            images = torch.stack([image.mean(0) for image in images])
        return self.net(images)


def boxes(outputs: Tensor, batch: Batch) -> Tensor:
    return torch.stack([(z - t["boxes"]).square().mean() for z, t in zip(outputs, batch.targets, strict=True)])


def areas(outputs: Tensor, batch: Batch) -> Tensor:
    return torch.stack([z.square().sum() * len(t["labels"]) for z, t in zip(outputs, batch.targets, strict=True)])


def detection(size: int, seed: int, *, listed: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    images: Any = [normal(2 + i, 4) for i in range(size)] if listed else normal(size, 4)
    counts = [1 + (i + seed) % 3 for i in range(size)]
    targets = [{"boxes": normal(n, 4), "labels": torch.ones(n, dtype=torch.long)} for n in counts]
    return Batch((images,) if listed else images, targets)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("sizes", [(5, 6), (1, 2), (3, 1)])
def test_detection(listed, sizes):
    batch, meta_batch = (detection(size, seed, listed=listed) for seed, size in enumerate(sizes))

    def case() -> Case:
        return sgd(seeded(Detector), terms={"boxes": boxes, "areas": areas}, meta_loss=boxes)

    for estimator in MODES:
        balancer = assert_right(case, given=([batch], meta_batch), estimator=estimator)
        assert balancer.report.weights.shape == (sizes[0], 2)
    assert_right(case, 2, given=([batch, meta_batch], meta_batch))
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")
    item, meta_item = ((b.inputs, b.targets) for b in (batch, meta_batch))
    balancer = balanced(case())
    balancer(item, meta_item)  # as the loader yields it
    assert balancer.report.weights.shape == (sizes[0], 2)


def test_a_list_of_images_is_told_how_to_be_one_argument():
    batch, meta_batch = (detection(5, seed, listed=True) for seed in range(2))
    balancer = plain(seeded(Detector), {"boxes": boxes}, meta_loss=boxes)
    with pytest.raises(MetaKDError, match=r"elements of a list are positional arguments.*Batch\(inputs=\(elements,\)"):
        balancer((batch.inputs[0], batch.targets), (meta_batch.inputs[0], meta_batch.targets))


class Reader(nn.Module):
    """Logits of four symbols at each of six times, (B, 6, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view(-1, 6, 4)


def ctc(outputs: Tensor, batch: Batch) -> Tensor:
    labels, lengths = batch.targets
    times = torch.full((len(outputs),), 6)
    return F.ctc_loss(outputs.log_softmax(-1).transpose(0, 1), labels, times, lengths, reduction="none")


def weight(outputs: Tensor, batch: Batch) -> Tensor:
    return outputs.square().mean((1, 2))


def symbols(size: int, seed: int, *, joined: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (size,), generator=generator)
    labels = torch.randint(1, 4, (size, 3), generator=generator)
    if joined:
        labels = torch.cat([row[:n] for row, n in zip(labels, lengths.tolist(), strict=True)])
    return Batch(torch.randn(size, 4, dtype=torch.float64, generator=generator), (labels, lengths))


def reader() -> Case:
    return sgd(seeded(Reader), terms={"ctc": ctc, "weight": weight}, meta_loss=ctc)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("sizes", [(5, 6), (2, 3)])
def test_ctc(joined, sizes):
    batch, meta_batch = (symbols(size, seed, joined=joined) for seed, size in enumerate(sizes))
    differences = estimators.FiniteDifference()
    balancer = assert_right(reader, given=([batch], meta_batch), estimator=differences, tolerance=1e-4)
    assert balancer.report.weights.shape == (sizes[0], 2)
    assert_right(reader, 2, given=([batch, meta_batch], meta_batch), estimator=differences, tolerance=1e-4)


class TimesFirst(Reader):
    """Its inputs are (4, B), and nothing but the user knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.T)


def test_a_size_that_cannot_be_told_is_asked_for():
    def turned(batch: Batch) -> Batch:
        return Batch(batch.inputs.T, batch.targets)

    batch, meta_batch = (turned(symbols(size, seed, joined=True)) for seed, size in enumerate((5, 6)))
    case = sgd(seeded(TimesFirst), terms={"ctc": ctc, "weight": weight}, meta_loss=ctc)
    with pytest.raises(MetaKDError, match=r"Batch\(size=\.\.\.\)"):
        balanced(case, estimator=estimators.FiniteDifference())(batch, meta_batch)
    given = [batch._replace(size=5)], meta_batch._replace(size=6)
    build = lambda: sgd(seeded(TimesFirst), terms=case.terms, meta_loss=ctc)  # noqa: E731
    assert_right(build, given=given, estimator=estimators.FiniteDifference(), tolerance=1e-4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5), nn.Linear(5, 3)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.head(self.rnn(packed)[1][0][-1])


def sequences(size: int, seed: int) -> tuple[PackedSequence, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (2 * i + seed) % 5 for i in range(size)]  # not sorted
    parts = [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in lengths]
    return pack_sequence(parts, enforce_sorted=False), torch.randint(3, (size,), generator=generator)


def without_labels(outputs: Tensor, batch: Batch) -> Tensor:
    return -outputs.log_softmax(1).exp().square().sum(1)


@pytest.mark.parametrize("labelled", [True, False])
def test_packed_sequences(labelled):
    items = [sequences(5, 0), sequences(6, 1)]
    terms = {"sure": without_labels, "size": lambda outputs, batch: outputs.square().mean(1)}
    options = {} if labelled else {"terms": terms, "meta_loss": without_labels}
    batch, meta_batch = (Batch(packed, y if labelled else None) for packed, y in items)

    def case() -> Case:
        return sgd(seeded(Recurrent), **options)

    for estimator in MODES:
        balancer = assert_right(case, given=([batch], meta_batch), estimator=estimator)
    assert_right(case, 2, given=([batch, meta_batch], meta_batch))
    assert check_hypergradient(balancer, [batch], meta_batch).verdict.startswith("exact")
    expected, balancer = balancer.report.influence, balanced(case())
    balancer(*(item if labelled else item[0] for item in items))  # as the loader yields it
    torch.testing.assert_close(balancer.report.influence, expected)


# 18. Advice after a warning, and two threads.


class Distances(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.centres, self.how = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5)), how

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.first(x), self.centres, compute_mode=self.how)


def distances(how: str) -> Callable[[], Case]:
    return lambda: sgd(seeded(lambda: Distances(how)))


FUSED, PRODUCTS = "donot_use_mm_for_euclid_dist", "use_mm_for_euclid_dist"
ALL = [
    estimators.OneStep(),
    estimators.OneStep("forward"),
    estimators.OneStep("reverse"),
    estimators.Adjoint(),
    estimators.Adjoint("auto"),
    estimators.Unroll(),
]


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("what", ["cdist", "ctc"])
def test_where_no_derivative_is_left_the_advice_is_finite_differences(what, estimator):
    build, given = (distances(FUSED), data()) if what == "cdist" else (reader, (symbols(5, 0, joined=False),) * 2)
    balancer = balanced(build(), estimator=estimator)
    steps = [lambda: balancer(*given), lambda: check_hypergradient(balancer, [given[0]], given[1])]
    if not isinstance(estimator, estimators.OneStep):
        steps.append(lambda: balancer.meta_step(given, given[1]))
    for step in steps * 2:  # a second call knows no more than the first
        with warnings.catch_warnings(record=True) as caught, pytest.raises(MetaKDError) as error:
            warnings.simplefilter("always")
            step()
        said = str(error.value)
        assert "estimators.FiniteDifference()" in said and "'forward'" not in said, said
        assert not [w for w in caught if "takes its place" in str(w.message)]
    tolerance = {"estimator": estimators.FiniteDifference(), "tolerance": 1e-4}
    assert_right(build, given=([given[0]], given[1]), **tolerance)


@pytest.mark.filterwarnings("ignore:.*no forward-mode derivative.*reverse mode takes its place")
def test_a_distance_with_a_second_derivative():
    for estimator in (estimators.OneStep(), estimators.OneStep("reverse"), estimators.Adjoint(), estimators.Unroll()):
        assert_right(distances(PRODUCTS), estimator=estimator)
    assert_right(distances(PRODUCTS), 2)
    with pytest.raises(MetaKDError, match=r"mode='forward'\) fails: .*use mode='auto' or 'reverse'"):
        balanced(distances(PRODUCTS)(), estimator=estimators.OneStep("forward"))(*data())


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.view(-1, 2, 2))[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = mlp(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint.checkpoint(self.first, x, use_reentrant=False))


def orthogonal() -> nn.Module:
    first = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder")
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.stack([x, x.sin(), x.cos()], dim=1)).mean(1))


class Pausing(nn.Module):
    """Lets the other thread go on in the middle of a pass."""

    def __init__(self, net: nn.Module, seconds: float) -> None:
        super().__init__()
        self.net, self.seconds = net, seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.net(x)


def training(student: Callable[[], nn.Module], estimator: Any, seed: int, start: Any = None) -> Any:
    """A function that trains for ten iterations; it gives the influences, and whether forward mode is found missing."""
    net = seeded(student)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * seed)
    balancer = balanced(sgd(Pausing(net, 0.001 * (1 + 0.7 * seed))), estimator=estimator)
    batches = [data(seed=s) for s in range(seed, seed + 10)]

    def run() -> tuple[list[Tensor], Any]:
        if start is not None:
            start.wait()
        found = []
        for batch, meta_batch in batches:
            loss = balancer(batch, meta_batch)
            found.append(balancer.report.influence)
            if not isinstance(estimator, estimators.OneStep):
                balancer.meta_step([batch, meta_batch], meta_batch)
                found.append(balancer.weighting.free.grad.clone())
            net.zero_grad()
            loss.backward()
            balancer.optimizer[0].step()
        return found, balancer._memory.forward_mode

    return run


def beside_each_other(student: Callable[[], nn.Module], estimator: Any) -> list[Any]:
    start = threading.Barrier(2)
    runs = [training(student, estimator, seed, start) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return [future.result(timeout=60) for future in [pool.submit(run) for run in runs]]


def settings() -> dict[str, Any]:
    """What all threads of a process share."""
    return {
        "onednn": torch.backends.mkldnn.enabled,
        "cudnn": torch.backends.cudnn.enabled,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "checkpoints": checkpoint._checkpoint_hook,
        "cache": parametrize._cache,
    }


@pytest.fixture
def shared() -> Iterator[dict[str, Any]]:
    """The settings before the test, which are put back after it."""
    kept = settings()
    yield kept
    torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled = kept["onednn"], kept["cudnn"]
    torch.backends.mha.set_fastpath_enabled(kept["fast path"])
    torch.backends.cuda.enable_flash_sdp(kept["flash attention"])
    torch.backends.cuda.enable_mem_efficient_sdp(kept["efficient attention"])
    checkpoint._checkpoint_hook, parametrize._cache = kept["checkpoints"], kept["cache"]


THREADED = [mlp, Sequences, Attention, Checkpointed, orthogonal]


@pytest.mark.parametrize("student", THREADED)
@pytest.mark.parametrize("estimator", [estimators.OneStep(), estimators.Adjoint()])
def test_two_threads_are_two_trainings(student, estimator, shared):
    one_by_one = [training(student, estimator, seed)() for seed in range(2)]
    for _ in range(3):
        together = beside_each_other(student, estimator)  # a warning there is an error
        for (alone, mode), (found, other) in zip(one_by_one, together, strict=True):
            assert mode == other  # no fall to reverse mode that stays
            for one, another in zip(alone, found, strict=True):
                torch.testing.assert_close(another, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("student", [mlp, Sequences])
def test_two_threads_leave_the_settings_of_the_process_as_they_were(student, shared):
    for _ in range(3):
        beside_each_other(student, estimators.OneStep())
    now = settings()
    assert [name for name in now if now[name] is not shared[name]] == []


def test_copies_of_one_student_in_two_threads(shared):
    """Two balancers of copies of one student keep to their own."""
    student = seeded(mlp)
    balancers = [balanced(sgd(copy.deepcopy(student))) for _ in range(2)]
    batch, meta_batch = data()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda balancer: balancer(batch, meta_batch).backward(), balancers))
    first, second = ([p.grad for p in balancer.student.parameters()] for balancer in balancers)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
