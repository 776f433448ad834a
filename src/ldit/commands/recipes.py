"""`ldit recipes`: the recipes that `ldit train` knows by name."""

from ldit.config.recipes.registry import RECIPES
from ldit.config.requests.other import RecipesRequest


def run(request: RecipesRequest) -> int:
    """`ldit recipes`: a name and a line each."""
    width = max(map(len, RECIPES)) + 2
    for name, recipe in RECIPES.items():
        print(f"{name:<{width}}{(recipe.__doc__ or '').strip()}")
    return 0
