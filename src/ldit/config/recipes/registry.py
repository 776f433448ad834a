"""Recipes by name: functions that return the configuration of a run, for `ldit train NAME`."""

import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ldit.config.experiment import Experiment
from ldit.config.kinds import run_from_json
from ldit.config.requests.fields import nearest
from ldit.config.run import BaseRun, RunConfig
from ldit.errors import ConfigError

_HERE = "ldit.config.recipes"
RECIPES = {
    "emoji64-class-xs": f"{_HERE}.emoji64:emoji64_class_xs",
    "emoji64-class-s": f"{_HERE}.emoji64:emoji64_class_s",
    "emoji64-text": f"{_HERE}.emoji64:emoji64_text",
    "emoji64-vae": f"{_HERE}.emoji64:emoji64_vae",
    "emoji64-latent-s": f"{_HERE}.emoji64:emoji64_latent_s",
    "finetune-small": f"{_HERE}.finetune:finetune_small",
    "extractor-small": f"{_HERE}.tiny:extractor_small",
    "tiny-cpu": f"{_HERE}.tiny:tiny_cpu",
    "imagenet256-600m": f"{_HERE}.imagenet:imagenet256_600m",
    "imagenet256-3b": f"{_HERE}.imagenet:imagenet256_3b",
    "imagenet256-7b": f"{_HERE}.imagenet:imagenet256_7b",
    "imagenet512-3b": f"{_HERE}.imagenet:imagenet512_3b",
    "dit-xl-2": f"{_HERE}.original_dit:dit_xl_2",
    "dit-s-2": f"{_HERE}.original_dit:dit_s_2",
    "sit-xl-2": f"{_HERE}.original_dit:sit_xl_2",
}
"""Name -> "module:function", imported on demand."""
EXPERIENCE = {
    "emoji64-class-xs": ("2 CPU cores (bf16), 100 min", "docs/emoji64-class-xs.md"),
    "emoji64-class-s": ("one GPU", "not run yet"),
    "emoji64-text": ("2 CPU cores (bf16), hours", "docs/emoji64-text.md"),
    "emoji64-vae": ("2 CPU cores (bf16), 70 min", "docs/emoji64-vae.md"),
    "emoji64-latent-s": ("one GPU", "not run yet"),
    "finetune-small": ("2 CPU cores (fp32), an hour", "docs/train.md"),
    "extractor-small": ("2 CPU cores, minutes", "docs/evaluate.md"),
    "tiny-cpu": ("2 CPU cores, seconds", "grey noise: a test of the parts"),
    "imagenet256-600m": ("8 GPUs of 80 GB", "the original's settings, not run here"),
    "imagenet256-3b": ("8 GPUs of 80 GB", "the original's settings, not run here"),
    "imagenet256-7b": ("8 GPUs of more than 80 GB", "the original's settings, not run here"),
    "imagenet512-3b": ("8 GPUs of 80 GB", "the original's settings, not run here"),
    "dit-xl-2": ("8 GPUs", "DiT's settings, not run here"),
    "dit-s-2": ("one GPU", "DiT's settings, not run here"),
    "sit-xl-2": ("8 GPUs", "SiT's settings, not run here"),
}
"""Name -> (hardware and time, where the result is described), as far as it was run."""
_LOADED: dict[str, Path] = {}
"""Name -> file of each module that was loaded from a user's file of recipes."""


def recipe_function(name: str) -> Callable[[], BaseRun]:
    """The function of a registered recipe; its docstring is the recipe's line in help."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r} (known: {', '.join(RECIPES)}){_nearest(name)}")
    module, _, function = RECIPES[name].partition(":")
    made: Callable[[], BaseRun] = getattr(importlib.import_module(module), function)
    return made


def recipe(name: str) -> BaseRun:
    """The configuration of a registered recipe."""
    return recipe_function(name)()


def diffusion_recipe(name: str) -> RunConfig:
    """The configuration of a recipe that trains a diffusion model; ConfigError for another."""
    config = recipe(name)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"recipe {name!r} trains no diffusion model")
    return config


def find_experiment(name: str) -> Experiment:
    """What `ldit train NAME` trains: a registered recipe, a user's FILE.py:FUNCTION, or the run directory NAME.

    The user's file is executed, with its folder first on Python's path. FUNCTION takes no arguments and returns a
    RunConfig (or the configuration of another kind of run) or an Experiment. ConfigError names what is missing.
    """
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), function)
    if name.endswith(".py"):
        raise ConfigError(f"{name}: name its function too, {name}:FUNCTION")
    if is_run_directory(name):
        return Experiment(config=_from_run(Path(name)))
    return Experiment(config=recipe(name))


def is_run_directory(name: str) -> bool:
    """Whether NAME in `ldit train NAME` is a run directory, which then is also --out. A model has a config.json too,
    whose format is a number."""
    file = Path(name) / "config.json"
    if name in RECIPES or not file.is_file():
        return False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # of which reading will say what is wrong
    is_model = isinstance(content, dict) and ("_class_name" in content or isinstance(content.get("format"), int))
    return not is_model


def _from_run(folder: Path) -> BaseRun:
    try:
        return run_from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {error}") from None


def _from_file(path: Path, function: str) -> Experiment:
    if not path.is_file():
        raise ConfigError(f"no file {path}")
    # The module gets the file's name, so that other processes can find its classes. It must not hide another module.
    existing = importlib.util.find_spec(path.stem) if path.stem.isidentifier() and path.stem not in _LOADED else None
    hidden = existing.origin if existing is not None else None  # None for a mere folder of that name
    if hidden is not None and Path(hidden).resolve() != path.resolve():
        raise ConfigError(f"{path}: there is a module {path.stem!r} already; give the file another name")
    # Execute the file and find the function.
    _LOADED[path.stem] = path.resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(path.resolve().parent))
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    make = _called(lambda: getattr(_executed(spec.loader, module), function, None), f"{path} cannot be imported")
    if not callable(make):
        own = [
            key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == spec.name
        ]
        known = ", ".join(key for key in own if not key.startswith("_")) or "none"
        raise ConfigError(f"{path} has no function {function!r}{nearest(function, own)} (it has: {known})")
    # Call it.
    made = _called(make, f"{path}:{function} failed")
    if isinstance(made, BaseRun):
        return Experiment(config=made)
    if not isinstance(made, Experiment):
        raise ConfigError(f"{path}:{function} must return a RunConfig or an Experiment, got {type(made).__name__}")
    return made


def _executed(loader: Any, module: ModuleType) -> ModuleType:
    loader.exec_module(module)
    return module


def _called(function: Callable[[], Any], failed: str) -> Any:
    """The result of the user's code; ConfigError names the line that raised an exception."""
    try:
        return function()
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{failed}: {reason}{place_of(error)}") from error


def place_of(error: BaseException) -> str:
    """Where an exception was raised in the folders of the user's recipes, as " (loss.py, line 7, in losses)"; "" for an
    exception from elsewhere."""
    folders = {file.parent for file in _LOADED.values()}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).resolve().parent in folders:
            return f" ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"
    return ""


def _nearest(name: str) -> str:
    return nearest(name, RECIPES) or "; FILE.py:FUNCTION is a recipe of your own"
