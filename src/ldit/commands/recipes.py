"""`ldit recipes`: lists the recipes that `ldit train` knows by name."""

from ldit.config.recipes.registry import RECIPES, recipe_function
from ldit.config.requests.other import RecipesRequest


def run(request: RecipesRequest) -> int:
    """`ldit recipes`: prints a line for each recipe."""
    width = max(map(len, RECIPES)) + 2
    for name in RECIPES:
        print(f"{name:<{width}}{(recipe_function(name).__doc__ or '').strip()}")
    return 0
