"""What `ldit train NAME` trains: a recipe, a run, or a model, which is fine-tuned."""

from dataclasses import replace
from pathlib import Path

from ldit.config.assets import ASSETS
from ldit.config.experiment import Experiment
from ldit.config.recipes.finetune import finetune
from ldit.config.recipes.registry import RECIPES, find_experiment, is_run_directory
from ldit.config.spec import AutoencoderConfig, TextConditionerConfig
from ldit.errors import ConfigError, SourceError
from ldit.storage.hub import is_hub_id


def experiment_of(name: str) -> Experiment:
    """A registered recipe, FILE.py:FUNCTION or run directory (`find_experiment`); or any model that can be sampled
    from (file, folder, bundled name, Hub id), with the recipe `finetune`. ConfigError or SourceError when NAME is
    nothing of these."""
    return _finetuning(name) if _is_model(name) else find_experiment(name)


def _is_model(name: str) -> bool:
    """Whether NAME is a model rather than a recipe or run. Whether it is a sound one shows when it is opened."""
    if name in RECIPES or ".py" in Path(name.partition(":")[0]).suffixes or is_run_directory(name):
        return False
    return Path(name).exists() or (ASSETS / "models" / name / "config.json").is_file() or is_hub_id(name)


def _finetuning(name: str) -> Experiment:
    from ldit.checkpoint.layouts.dit_pt import PtFile, is_pt, stated_process
    from ldit.checkpoint.open import open_source
    from ldit.codecs.open import private_codec

    # Nothing is guessed: a run that learns another process than its model had is not noticed for hours.
    path = Path(name)
    if is_pt(name) and path.is_file() and stated_process(path, PtFile(path, check=False).settings)[0] is None:
        raise SourceError(
            f"{name}: neither its settings nor its name say whether it is a DiT or a SiT; ldit convert {name} EXPORT "
            "--process ddpm|flow writes a model that does"
        )
    source = open_source(name)
    spec, record = source.spec, source.spec.training or {}
    own = next((record[part] for part in ("network", "process") if record.get(part)), None)
    if own:
        raise ConfigError(
            f"{name}: its network or process is not of this package ({own}); a recipe of your own, FILE.py:FUNCTION, "
            "can start from it (train.init_from)"
        )
    # A codec beside the model is named by its path: the run is elsewhere.
    if isinstance(spec.codec, AutoencoderConfig):
        beside = source.path if source.path.is_dir() else source.path.parent
        folder = private_codec(spec.codec.name, beside)
        if folder is not None:
            spec = replace(spec, codec=replace(spec.codec, name=str(folder.resolve())))
    # So is a text encoder below the model's folder.
    if isinstance(spec.conditioner, TextConditionerConfig):
        beside = source.path if source.path.is_dir() else source.path.parent
        own = spec.conditioner
        encoder, tokenizer = (_placed(name, beside) for name in (own.encoder, own.tokenizer))
        spec = replace(spec, conditioner=replace(own, encoder=encoder or own.encoder, tokenizer=tokenizer))
    return Experiment(config=finetune(spec, str(path.resolve()) if path.exists() else name))


def _placed(name: str | None, beside: Path) -> str | None:
    """The path of a text model below a folder, else its name."""
    from ldit.codecs.text import find_text_model  # imports torch, which help does not need

    folder = None if name is None else find_text_model(name, [beside])
    is_below = folder is not None and folder.resolve().is_relative_to(beside.resolve())
    return str(folder.resolve()) if folder is not None and is_below else name
