"""The page on parts of your own: its code runs on top of the home page's, and its broken parts are refused."""

import re
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch

import metakd
from metakd import BilevelLossBalancer, MetaKDError
from tests.docs.pages import HOME, execute, text_of

PAGE = text_of("docs/extending.md")
ARGUMENTS = {"weight model": "weighting", "features": "features", "inner": "inner", "estimator": "estimator"}


def broken_parts():
    """(kind of part, its code), from the page's tables."""
    found = []
    for table in re.findall(r"^\| (.*) \| the error says \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE):
        for row in table[1].splitlines():
            code = re.fullmatch(r"\| `(.*?)` \| .* \|", row)[1]
            found.append(pytest.param(table[0], code, id=f"{table[0]}: {code}"))
    return found


@pytest.fixture(scope="module")
def setting():
    """What the home page's example leaves behind."""
    torch.manual_seed(0)
    scope = {name: getattr(metakd, name) for name in ("MetaKDError", "check_hypergradient", "validate", "estimators")}
    execute(HOME, scope)
    return scope


@pytest.fixture(scope="module")
def page(setting):
    """What the page's code leaves behind, every balancer of it, and what it printed."""
    scope, balancers, said = dict(setting), [], StringIO()

    def collect(scope):
        if scope["balancer"] not in [*balancers, setting["balancer"]]:
            balancers.append(scope["balancer"])

    with redirect_stdout(said):
        execute("docs/extending.md", scope, after=collect)
    return scope, balancers, said.getvalue()


def test_every_part_learns(page):
    scope, balancers, _ = page
    assert len(balancers) == 12
    for balancer in balancers:
        before = balancer.weights(scope["train"][0])
        for _ in range(3):
            balancer(scope["train"][0], scope["meta"])
        assert balancer.report.influence.any()
        learned = balancer.weights(scope["train"][0])
        assert balancer.weighting_optimizer is None or not torch.equal(before, learned)


def test_the_textbooks_estimator_is_exact_and_the_clipped_one_clips(page):
    scope, *_ = page
    balancer = BilevelLossBalancer(
        scope["student"], [scope["focal"], scope["CrossEntropy"]()], optimizer=scope["optimizer"], inner="mirror"
    )
    with balancer.problem(scope["train"][:3], scope["meta"], torch.float64) as problem:
        found, known = scope["Textbook"]()(problem), metakd.estimators.Adjoint()(problem)
        short = scope["Clipped"](metakd.estimators.Adjoint(), norm=1e-5)(problem).gradient
    torch.testing.assert_close(found.gradient, known.gradient, rtol=1e-9, atol=1e-14)
    length = torch.cat([g.flatten() for g in short.values()]).norm()
    assert length.item() == pytest.approx(1e-5)


def test_the_checks_say_what_the_page_says(page):
    scope, _, said = page
    assert said.count("exact: the largest relative error") == 3
    assert said.count("a stop-gradient") == said.count("relative error") - 3 > 0
    assert max(scope["found"].relative_error.values()) > 1e-6


@pytest.mark.parametrize(("kind", "code"), broken_parts())
def test_a_broken_part_is_refused(page, kind, code):
    scope, *_ = page
    part = eval(code, scope)
    terms = {"hard": scope["CrossEntropy"](), "own": part if kind == "term" else scope["SoftTarget"]()}
    options = {} if kind == "term" else {ARGUMENTS[kind]: part}
    with pytest.raises(MetaKDError):
        BilevelLossBalancer(scope["student"], terms, optimizer=scope["optimizer"], teacher=scope["teacher"], **options)(
            scope["train"][0], scope["meta"]
        )


def test_there_are_broken_parts_of_every_kind():
    assert {part.values[0] for part in broken_parts()} == {"term", *ARGUMENTS}
