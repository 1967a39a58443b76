"""`docs/errors.md` has every message of the source, explained, and what is raised can be found there."""

import re

import pytest
import torch
from torch import nn

from docs import errors
from docs.messages import FRAMES, Message, Source, calls, messages
from metakd import BilevelLossBalancer, MetaKDError
from tests.test_errors import CALLS, CONSTRUCTION, HARD, parts

PAGE = errors.PAGE.read_text(encoding="utf-8")
KNOWN = messages(errors.ROOT / "metakd")
HEAD, ON_PAGE = errors.parsed(PAGE)
ENTRIES = [entry for _, entries in ON_PAGE.values() for entry in entries]
TEXTS = [text for entry in ENTRIES for text in entry.texts]


def test_the_page_is_that_of_the_source():
    assert errors.rewritten(PAGE, KNOWN) == PAGE, "run python docs/errors.py, and explain what is new"
    assert sorted(TEXTS) == sorted(message.text for message in KNOWN)
    assert list(ON_PAGE) == list(errors.GROUPS)


def test_every_message_has_a_cause_and_a_cure():
    for entry in ENTRIES:
        assert re.fullmatch(r"\*Cause:\* .*\S\s+\*Cure:\*\s.*\S", entry.explanation, re.DOTALL), entry


def test_no_place_that_raises_is_overlooked():
    source = Source(errors.ROOT / "metakd")
    sites = [len(calls(tree, "MetaKDError", "Finding")) for tree in source.trees.values()]
    read = [sum(len(calls(f, "MetaKDError", "Finding")) for f in source.functions(module)) for module in source.trees]
    assert read == sites and sum(sites) > 200


MODULE = """
from metakd.errors import MetaKDError

CURE = "give it another name"
TABLE = {"a": "the first one is not to be had", "b": "the second one is not to be had"}


def why(x):
    if x:
        return f"it has the colour {x.colour} and should not"
    return None


def f(x, n):
    if n < 0:
        raise MetaKDError(f"n is {n}, a number of things; {CURE}")
    for key, meaning in TABLE.items():
        if x == key:
            raise MetaKDError(meaning)
    found = why(x)
    raise MetaKDError(f"{type(x).__name__} cannot be taken, {found}") from None


def checked(x, cure):
    raise MetaKDError(f"x is {len(x)} long; {cure}")


def g(x, error):
    checked(x, "make it a little shorter")
    checked(x, "make it a little longer")
"""

SAID = [
    "n is {n}, a number of things; give it another name",
    "the first one is not to be had",
    "the second one is not to be had",
    "{type} cannot be taken, it has the colour {colour} and should not",
    "x is {number} long; make it a little shorter",
    "x is {number} long; make it a little longer",
]


def test_messages_are_followed_through_variables_tables_functions_and_callers(tmp_path):
    (tmp_path / "module.py").write_text(MODULE, encoding="utf-8")
    assert sorted(message.text for message in messages(tmp_path)) == sorted(SAID)


def test_a_message_that_cannot_be_followed_is_refused(tmp_path):
    (tmp_path / "module.py").write_text(MODULE.replace("MetaKDError(meaning)", "MetaKDError(str(x))"), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot tell what f in module says"):
        messages(tmp_path)


def test_a_module_in_no_group_is_refused():
    with pytest.raises(ValueError, match="elsewhere is in no group"):
        errors.group(Message("words", "elsewhere", False))


def test_explanations_survive_a_change_of_words():
    text = "tau is {tau}, it must be finite and at least 0; 1 is the usual choice"
    other = text.replace("finite and at least", "a number of at least")
    explanation = next(entry.explanation for entry in ENTRIES if text in entry.texts)
    known = [message._replace(text=other) if message.text == text else message for message in KNOWN]
    page = errors.rewritten(PAGE, known)
    _, groups = errors.parsed(page)
    (entry,) = (entry for _, entries in groups.values() for entry in entries if other in entry.texts)
    assert entry.explanation == explanation and text not in page
    assert errors.rewritten(page, KNOWN) == PAGE


def test_a_new_message_asks_for_an_explanation_and_an_old_one_goes():
    gone, new = KNOWN[0].text, Message("the zebra crossed without looking", "terms/base", False)
    page = errors.rewritten(PAGE, [*KNOWN[1:], new])
    assert f"`{new.text}`<br>\n  {errors.UNEXPLAINED}" in page and gone not in page


@pytest.mark.parametrize("case", [*CALLS, *CONSTRUCTION])
def test_what_is_raised_is_on_the_page(case):
    student, optimizer, _, _ = parts()
    with pytest.raises(MetaKDError) as caught:
        if case in CALLS:
            options, *batches, _ = CALLS[case]
            BilevelLossBalancer(student, **{"terms": HARD, "optimizer": optimizer} | options)(*batches)
        else:
            options = {"terms": HARD, "optimizer": optimizer} | CONSTRUCTION[case][0](student, optimizer)
            BilevelLossBalancer(student, **options)
    found = errors.find(str(caught.value), KNOWN)
    assert found in TEXTS and found not in FRAMES
    assert errors.find(f"reading the batch: {caught.value}", KNOWN) == found


def test_one_of_several_findings_is_found():
    student = nn.Sequential(nn.EmbeddingBag(9, 4, max_norm=1.0), nn.Linear(4, 3))
    with pytest.raises(MetaKDError, match=r"second derivatives for it.*\n.*with max_norm") as caught:
        BilevelLossBalancer(student, HARD, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
    assert errors.find(str(caught.value), KNOWN).startswith("{where}: torch has neither forward mode")
    assert errors.find("the zebra crossed the road", KNOWN) is None
