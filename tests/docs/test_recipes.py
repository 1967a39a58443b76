"""The page on recipes runs, and names them all."""

from metakd import recipes
from tests.docs.pages import blocks, run_page


def test_every_recipe_weights_a_batch():
    def weigh(scope):
        scope["balancer"].weights((*scope["train"][0], scope["torch"].arange(16)))

    assert run_page("docs/recipes.md", after=weigh)["loss"].item() > 0


def test_every_recipe_has_its_section():
    code = "".join(block.code for block in blocks("docs/recipes.md"))
    assert all(f"recipes.{name}(" in code for name in recipes.__all__)
