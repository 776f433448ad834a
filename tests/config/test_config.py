"""Strict JSON, defaults of the contract, recipes."""

import json
from dataclasses import replace
from typing import Any

import pytest

from ldit.config.kinds import run_from_json
from ldit.config.labels import resolve_label
from ldit.config.model import ClassModelConfig, OriginalDiTConfig, TextModelConfig, model_from_dict
from ldit.config.presets import PRESETS, preset
from ldit.config.recipes.registry import RECIPES, recipe
from ldit.config.sections import ObjectiveConfig
from ldit.config.spec import AutoencoderConfig, DDPMConfig, FlowConfig, ModelSpec, PixelCodecConfig
from ldit.errors import ConfigError, RequestError
from ldit.nn.build import parameter_count

CONTRACT = {
    "format": 1,
    "model": {
        "kind": "class", "input_size": 32, "patch_size": 2, "in_channels": 4, "dim": 1536, "n_layers": 16,
        "n_heads": 32, "n_kv_heads": None, "multiple_of": 256, "ffn_dim_multiplier": None, "norm_eps": 1e-5,
        "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": True, "qk_norm": True, "rope": "raster",
    },
    "process": {"kind": "ddpm"},
    "conditioner": {"kind": "class", "names": None},
    "codec": {
        "kind": "autoencoder_kl", "name": "stabilityai/sd-vae-ft-ema", "scale": 0.18215, "shift": 0.0, "factor": 8,
    },
    "sampling": {
        "solver": "ddpm", "steps": 250, "guidance": 4.0, "guidance_channels": 3, "guidance_interval": [0, 1],
    },
    "training": {"step": 1350000, "images": 345600000},
}  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    """CONTRACT with one key set, or removed when the value is ...."""
    data: dict[str, Any] = json.loads(json.dumps(CONTRACT))
    *parents, leaf = path.split(".")
    inner = data
    for name in parents:
        inner = inner[name]
    if value is ...:
        del inner[leaf]
    else:
        inner[leaf] = value
    return data


def test_the_contract_example_reads_and_writes() -> None:
    spec = ModelSpec.from_json(CONTRACT)
    assert spec.model == preset("DiT_Llama_600M_patch2", qk_norm=True)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model.dimm", 3, "model.dimm"),
        ("extra", 3, "extra"),
        ("codec.factory", 3, "codec.factory"),
        ("model.max_seq_len", 3, "model.max_seq_len"),
        ("model", ..., "model"),
        ("process", ..., "process"),
        ("codec", ..., "codec"),
        ("format", ..., "format"),
        ("format", 2, "format 2 is newer"),
        ("format", True, "format"),
        ("model.kind", "video", "model.kind"),
        ("model.kind", ["class"], "model.kind"),
        ("process.kind", "vp", "process.kind"),
        ("model.dim", "1536", "model.dim"),
        ("model.dim", 1536.5, "model.dim"),
        ("model.dim", True, "model.dim"),
        ("model.dim", 0, "model.dim"),
        ("model.n_heads", 7, "model.n_heads"),
        ("model.n_kv_heads", 5, "model.n_kv_heads"),
        ("model.qk_norm", "heads", "model.qk_norm"),
        ("model.rope", "3d", "model.rope"),
        ("model.input_size", 33, "model.input_size"),
        ("model.norm_eps", float("nan"), "model.norm_eps"),
        ("model.norm_eps", -1.0, "model.norm_eps"),
        ("model.class_dropout_prob", 1.0, "model.class_dropout_prob"),
        ("conditioner.names", ["cat"], "conditioner.names"),
        ("conditioner.names", "cat", "conditioner.names"),
        ("sampling.guidance_interval", [0], "sampling.guidance_interval"),
        ("sampling.steps", None, "sampling.steps"),
        ("codec.kind", "pixels", "codec.name"),
        ("training", [], "training"),
    ],
)  # fmt: skip
def test_faults_name_their_key(path: str, value: Any, named: str) -> None:
    data = changed(path, value)
    if path == "training":
        data["training"] = [1]
    with pytest.raises(ConfigError) as error:
        ModelSpec.from_json(data)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_absent_keys_take_the_original_constructors_defaults() -> None:
    assert model_from_dict({}) == ClassModelConfig()
    config = ClassModelConfig()
    assert (config.dim, config.n_layers, config.n_heads, config.input_size, config.num_classes) == (
        4096,
        32,
        32,
        32,
        1000,
    )
    assert (config.class_dropout_prob, config.learn_sigma, config.qk_norm, config.norm_eps) == (0.1, True, False, 1e-5)
    text = model_from_dict({"kind": "text"})
    assert isinstance(text, TextModelConfig)
    assert (text.max_seq_len, text.cap_feat_dim, text.rope_scaling_factor) == (288, 5120, 1.0)


def test_ffn_width() -> None:
    hidden = {name: preset(name).ffn_hidden for name in PRESETS}
    assert [hidden[f"DiT_Llama_{size}_patch2"] for size in ("600M", "3B", "7B")] == [4096, 8192, 11008]
    assert ClassModelConfig(dim=64, n_heads=4, multiple_of=32, ffn_dim_multiplier=1.3).ffn_hidden == 224


def test_sampling_defaults_of_each_process() -> None:
    model = ClassModelConfig(in_channels=3)
    ddpm = ModelSpec(model, DDPMConfig(), PixelCodecConfig()).sampling_defaults
    assert (ddpm.solver, ddpm.steps, ddpm.guidance, ddpm.guidance_channels) == ("ddpm", 250, 4.0, 3)
    two = ModelSpec(ClassModelConfig(in_channels=2), DDPMConfig(), AutoencoderConfig()).sampling_defaults
    assert two.guidance_channels == 2
    flow = ModelSpec(model, FlowConfig(), PixelCodecConfig()).sampling_defaults
    assert (flow.solver, flow.steps, flow.guidance, flow.guidance_channels) == ("heun", 25, 1.5, "all")
    assert flow.guidance_interval == (0.0, 1.0)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name: str) -> None:
    config = recipe(name)
    assert run_from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pass_check(name: str) -> None:
    """As they are, or with a folder of images where they name none."""
    config = recipe(name)
    replace(config, data=replace(config.data, path=config.data.path or "somewhere")).check()
    if not config.data.path:
        with pytest.raises(ConfigError, match=r"data\.path: name the folder"):
            config.check()


@pytest.mark.parametrize(
    ("name", "parameters", "batch", "size"),
    [
        ("imagenet256-600m", 609_836_576, 256, 32),
        ("imagenet256-3b", 4_237_824_032, 256, 32),
        ("imagenet256-7b", 7_293_819_936, 512, 32),
        ("imagenet512-3b", 4_237_824_032, 256, 64),
    ],
)
def test_imagenet_recipes_are_the_originals(name: str, parameters: int, batch: int, size: int) -> None:
    config = recipe(name)
    assert parameter_count(config.model) == parameters
    assert (config.train.batch_size, config.model.input_size) == (batch, size)
    assert isinstance(config.process, DDPMConfig) and isinstance(config.codec, AutoencoderConfig)
    assert (config.train.lr, config.train.grad_clip, config.ema.decay) == (1e-4, 2.0, 0.9999)
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (0.9, 0.999, 0.0)
    assert config.train.precision == "bf16" and config.data.flip and config.model.qk_norm is True


def test_sizes_of_our_recipes() -> None:
    assert parameter_count(recipe("tiny-cpu").model) <= 300_000
    assert parameter_count(recipe("emoji64-class-xs").model) * 2 <= 16_000_000  # bytes in bf16


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("train", {"batch_size": 0}, "train.batch_size"),
        ("train", {"micro_batch_size": 5}, "train.micro_batch_size"),
        ("train", {"lr": 0.0}, "train.lr"),
        ("train", {"steps": 0}, "train.steps"),
        ("train", {"log_every": -1}, "train.log_every"),
        ("train", {"warmup": 30, "cooldown": 21}, r"train\.steps: 50 are .* train\.warmup 30 \+ train\.cooldown 21"),
        ("parallel", {"tp": 3}, r"parallel\.tp: 3 does not divide model\.n_heads 4"),
        ("objective", {"time_mean": 0.5}, r"objective\.time_\w+: DDPM"),
        ("objective", {"time_std": 2.0}, r"objective\.time_\w+: DDPM"),
        ("ema", {"decay": 1.0}, "ema.decay"),
        ("data", {"path": ""}, "data.path"),
        ("data", {"image_size": 32}, "data.image_size"),
    ],
)
def test_run_faults_name_their_key(section: str, change: dict[str, Any], named: str) -> None:
    config = recipe("tiny-cpu")
    with pytest.raises(ConfigError, match=named):
        replace(config, **{section: replace(getattr(config, section), **change)}).check()


@pytest.mark.parametrize(
    ("tp", "named"), [(1, ""), (2, "n_kv_heads 3"), (3, ""), (4, "n_heads 6"), (6, "n_kv_heads 3")]
)
def test_processes_share_whole_heads(tp: int, named: str) -> None:
    """Those of the queries and those of the keys, where there are fewer of these."""
    config = recipe("tiny-cpu")
    model = replace(config.model, dim=48, n_heads=6, n_kv_heads=3)
    shared = replace(config, model=model, parallel=replace(config.parallel, tp=tp))
    if named:
        with pytest.raises(ConfigError, match=rf"^parallel\.tp: {tp} does not divide model\.{named}$"):
            shared.check()
    else:
        shared.check()


@pytest.mark.parametrize("train", [{"warmup": 30, "cooldown": 20}, {"cooldown": 50}])
def test_a_cooldown_may_begin_where_the_warm_up_ends(train: dict[str, Any]) -> None:
    config = recipe("tiny-cpu")
    replace(config, train=replace(config.train, **train)).check()


def test_flow_draws_its_times_as_the_objective_says() -> None:
    config = recipe("emoji64-class-xs")
    replace(config, objective=ObjectiveConfig(0.5, 2.0)).check()
    replace(recipe("tiny-cpu"), objective=ObjectiveConfig()).check()


NAMES = ("Cat", "cat", "catfish", "dog")


@pytest.mark.parametrize(
    ("label", "index"), [(2, 2), ("2", 2), ("cat", 1), ("Cat", 0), ("DOG", 3), ("catf", 2), ("d", 3)]
)
def test_labels(label: int | str, index: int) -> None:
    assert resolve_label(label, 4, NAMES) == index


@pytest.mark.parametrize(
    ("label", "said"), [("CAT", "ambiguous"), ("ca", "ambiguous"), ("bird", "bird"), (4, "0 to 3"), (-1, "-1")]
)
def test_labels_that_do_not_fit(label: int | str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        resolve_label(label, 4, NAMES)


def test_names_without_a_table() -> None:
    with pytest.raises(RequestError, match="no class names"):
        resolve_label("cat", 4, None)


def test_imagenet_names() -> None:
    from ldit.config.assets import imagenet_names

    names = imagenet_names()
    assert len(names) == len(set(names)) == 1000
    assert (names[207], names[360], names[88]) == ("golden retriever", "otter", "macaw")


def test_baseline_sizes() -> None:
    assert parameter_count(OriginalDiTConfig()) == 675_129_632  # DiT-XL/2 with its position table
