"""`ldit recipes`: lists the recipes that `ldit train` knows by name."""

from ldit.config.recipes.registry import EXPERIENCE, RECIPES, recipe, recipe_function
from ldit.config.requests.other import RecipesRequest
from ldit.readable import table


def run(request: RecipesRequest) -> int:
    """`ldit recipes`: prints a table, a row for each recipe."""
    rows = [["recipe", "what", "data", "steps x batch", "hardware, time", "result"]]
    for name in RECIPES:
        config, (hardware, result) = recipe(name), EXPERIENCE[name]
        data = f"{config.data.path or 'yours'}, {config.data.image_size} px"
        budget = f"{config.train.steps:,} x {config.train.batch_size}"
        rows.append([name, (recipe_function(name).__doc__ or "").strip(), data, budget, hardware, result])
    print(table(rows))
    print("\nldit train RECIPE --out RUN starts one; ldit train RECIPE --help shows its flags")
    return 0
