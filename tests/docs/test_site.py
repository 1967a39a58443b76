"""The site is laid out with links that lead where their ends are on it, and what is wrong with it is found."""

import pytest

from docs.build_site import files, mended
from docs.check_site import faults
from tests.docs.pages import ROOT, text_of

KNOWN = files(ROOT)


def test_all_pages_are_on_the_site():
    assert {"index.md", "systems/ldc_mtl.md", "benchmarks/results/iteration/README.md", "SECURITY.md"} <= KNOWN.keys()
    assert "images/layout.svg" in KNOWN and not any(name.endswith(".py") for name in KNOWN)


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("cost.md", "[a](theory.md#one-step)", "[a](theory.md#one-step)"),
        ("cost.md", "[a](../benchmarks/results/iteration/README.md)", "[a](benchmarks/results/iteration/README.md)"),
        ("benchmarks/results/iteration/README.md", "[a](../../../docs/cost.md#b)", "[a](../../../cost.md#b)"),
        ("CHANGELOG.md", "[a](docs/choose.md)", "[a](choose.md)"),
        ("CONTRIBUTING.md", "[the licence](LICENSE)", "the licence (`LICENSE`)"),
        ("cost.md", "[`metakd/batch.py`](../metakd/batch.py)", "`metakd/batch.py`"),
        ("cost.md", "```\n[a](../LICENSE)\n```", "```\n[a](../LICENSE)\n```"),
        ("cost.md", "[a](https://arxiv.org/abs/1) [b](nowhere.md)", "[a](https://arxiv.org/abs/1) [b](nowhere.md)"),
    ],
)
def test_links_lead_where_their_ends_are(page, link, there):
    assert mended(link, page, ROOT, KNOWN) == there


def test_what_is_wrong_with_a_site_is_found(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    (source / "sub").mkdir(parents=True)
    (site / "a").mkdir(parents=True)
    (source / "index.md").write_text("::: metakd.Batch\n::: metakd.Gone\n")
    (source / "a.md").touch()
    (source / "sub/gone.md").touch()
    right = (
        '<h3 id="metakd.Batch"></h3><a href="a/">a</a><a href="a/#b">b</a><a href="#metakd.Batch">c</a><code>$x$</code>'
    )
    (site / "index.html").write_text(right + "[d][metakd.Nix]")
    (site / "a/index.html").write_text(r'<p id="b">\(x\)</p><a href="..">a</a><a href="../#b">b</a><img src="c.png">')
    assert sorted(faults(source, site)) == sorted(
        [
            r"a/index.html: \(x\) is no formula",
            "a/index.html: ../#b leads nowhere",
            "a/index.html: c.png leads nowhere",
            "index.html: ][metakd.Nix] is no link",
            "index.md: no entry of metakd.Gone",
            "sub/gone.md has no page",
        ]
    )


def test_every_page_is_in_the_navigation_or_a_result():
    navigation = text_of("mkdocs.yml")
    pages = [name for name in KNOWN if name.endswith(".md") and not name.startswith("benchmarks/")]
    assert [name for name in pages if f": {name}\n" not in navigation] == []
