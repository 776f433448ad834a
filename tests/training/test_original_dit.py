"""The original DiT and SiT as networks of `ldit train`: against a loop of its own, with every process, from files."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import make_folder, over
from runs import started, tiny
from safetensors.torch import load_file
from smallrun import SIDE
from torch import Tensor

import ldit
from ldit.checkpoint.export import write_export
from ldit.checkpoint.open import open_source
from ldit.checkpoint.run import step_folder
from ldit.cli.main import main
from ldit.commands.convert import convert
from ldit.commands.finetune import experiment_of
from ldit.config.model import ClassModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.config.presets import original_dit
from ldit.config.recipes.finetune import finetune
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.run import RunConfig
from ldit.config.sections import ObjectiveConfig
from ldit.config.spec import SIT, AutoencoderConfig, DDPMConfig, FlowConfig, ModelSpec, PixelCodecConfig
from ldit.diffusion.build import build_process
from ldit.errors import ConfigError, SourceError
from ldit.nn.build import build_model, parameter_count
from ldit.nn.dit import init_weights
from ldit.nn.dit_original import fixed_table
from ldit.rng import generator
from ldit.training.init_from import _opened
from ldit.training.muon import orthogonalised
from ldit.training.step import train_step
from ldit.training.tasks.inputs import training_noise

SMALL = OriginalDiTConfig(16, 4, 3, 32, 2, 4, num_classes=9)


def weights(config: OriginalDiTConfig, seed: int = 1) -> dict[str, Tensor]:
    """A network's weights, none of them zero; the position table is the fixed one."""
    network = build_model(config)
    init_weights(network, lambda name: generator(seed, name))
    drawn = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() if name == "pos_embed" else p.detach() + 0.05 * torch.randn(p.shape, generator=drawn)
        for name, p in network.state_dict().items()
    }


def dit_run(objective: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    config = tiny(batch_size=4, lr=1e-3, grad_clip=0.0)
    return replace(config, model=SMALL, objective=ObjectiveConfig(**(objective or {})), **changes)


@pytest.mark.parametrize("process", [DDPMConfig(), SIT])
def test_training_is_a_plain_loop(process: DDPMConfig | FlowConfig) -> None:
    """Three steps of AdamW with decay on the network alone, its inputs drawn as the run draws them: equal losses and
    weights. The position table never moves: neither by AdamW's decay, nor in the average."""
    objective = {"times": "uniform"} if process == SIT else None
    config = dit_run(objective, process=process)
    config = replace(config, optim=replace(config.optim, weight_decay=0.1))
    config.check()
    state, task, loader = started(config)
    plain = build_model(SMALL)
    plain.load_state_dict(dict(zip(state.weights.names, [m.detach() for m in state.weights.masters], strict=True)))
    table = fixed_table(SMALL)
    assert torch.equal(plain.pos_embed, table)  # type: ignore[arg-type]
    trained = [p for p in plain.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1)
    form = build_process(process, config.objective)
    for batch in loader.from_step(0, 3):
        noise = training_noise(batch.inputs, batch.positions, 0, "noise")
        labels, t = task.draw_labels(batch), task.draw_times(batch)
        if process == SIT:
            uniform = [torch.rand((1,), generator=generator(0, "time", 0, p)) for p in batch.positions]
            assert torch.equal(t, torch.cat(uniform))
        loss = form.losses(lambda x, time, y=labels: plain(x, time, y), batch.inputs, t, noise)["loss"].mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        outcome = train_step(state, task, batch)
        assert outcome.values["loss"] == pytest.approx(loss.item(), rel=1e-6)
    own = dict(zip(state.weights.names, state.weights.masters, strict=True))
    for name, p in plain.named_parameters():
        torch.testing.assert_close(own[name].detach(), p.detach(), rtol=1e-5, atol=1e-6)
    average = dict(zip(state.weights.names, state.averages.main, strict=True))
    assert torch.equal(own["pos_embed"], table) and torch.equal(average["pos_embed"], table)
    assert not any(name.endswith(".pos_embed") for name, _, _ in state.optimizer.state())


def test_chunked_muon_takes_its_matrices() -> None:
    """Queries, keys and values apart, the six parts of adaLN apart, the rest whole; embedders are AdamW's."""
    config = dit_run()
    config = replace(config, optim=replace(config.optim, kind="muon", chunked=True))
    state, task, loader = started(config)
    muon = state.optimizer.matrices
    assert {name.split(".", 2)[-1] for name in muon} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "adaLN_modulation.1.weight"
    }  # fmt: skip
    name = "blocks.1.attn.qkv.weight"
    with torch.no_grad():
        for i, p in enumerate(state.weights.masters):
            p.add_(torch.randn(p.shape, generator=generator(0, "moved", 0, i)) * 0.05)
    before = muon[name].detach().clone()
    (batch,) = loader.from_step(0, 1)
    train_step(state, task, batch)
    momentum = dict(zip(muon, state.optimizer.muon.buffers, strict=True))[name] / (1 - 0.95)  # the gradient
    parts = [orthogonalised(part, torch.float32) for part in momentum.chunk(3)]
    expected = before - 1e-3 * 0.2 * 32**0.5 * torch.cat(parts)
    torch.testing.assert_close(muon[name].detach(), expected, rtol=1e-4, atol=1e-6)


def test_attention_logits_are_measured() -> None:
    from ldit.training.hooks import attention_hook

    state, task, loader = started(dit_run())
    with torch.no_grad():
        for i, p in enumerate(state.weights.masters):
            p.add_(torch.randn(p.shape, generator=generator(0, "moved", 0, i)) * 0.2)
    seen: list[Tensor] = []
    block: Any = state.weights.model.blocks[1]  # type: ignore[index]
    block.attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
    logits = attention_hook(task, loader.data)(state)["attention_logit"]
    q, k, _ = seen[0].chunk(3, dim=-1)  # (B, T, D) each
    q, k = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (q, k))
    assert len(logits) == 2
    assert logits[1] == pytest.approx(((q @ k.transpose(-1, -2)).abs().max() / 8**0.5).item(), rel=1e-5)


def test_what_the_original_dit_does_not_have() -> None:
    for section, key, value, why in (
        ("objective", "dropout", 0.1, "the original DiT does not have it"),
        ("objective", "augment", 0.1, "the original DiT does not have it"),
        ("objective", "route", 0.5, "the original DiT does not have it"),
        ("parallel", "tp", 2, "use parallel.shard"),
    ):
        config = dit_run()
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
        with pytest.raises(ConfigError, match=f"{section}.{key}: .*{why}"):
            config.check()
    flow = dit_run({"times": "uniform", "time_mean": 0.5}, process=FlowConfig())
    with pytest.raises(ConfigError, match=r"objective\.time_mean: has no effect with objective\.times uniform"):
        flow.check()


def test_the_recipes() -> None:
    """Sizes as published: 675M parameters of DiT-XL/2 (with the fixed table), 33M of DiT-S/2."""
    millions = {size: round(parameter_count(original_dit(size)) / 1e6) for size in ("XL", "S")}
    assert millions == {"XL": 675, "S": 33}
    for name in ("dit-xl-2", "dit-s-2", "sit-xl-2"):
        config = diffusion_recipe(name)
        replace(config, data=replace(config.data, path="x")).check()
        assert RunConfig.from_json(config.to_json()) == config


# ---- every network with every process and codec


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photos") / "data", ("cat", "dog"), each=6, side=SIDE * 4)


@pytest.mark.parametrize("codec", ["pixels", "latents"])
@pytest.mark.parametrize("process", ["ddpm", "flow", "sit"])
@pytest.mark.parametrize("network", ["class", "dit"])
def test_networks_processes_and_codecs_cross(
    network: str, process: str, codec: str, photos: Path, tmp_path: Path
) -> None:
    """A run of each, its grid and evaluation left out, sampled from."""
    channels = 3 if codec == "pixels" else 4
    model: ClassModelConfig | OriginalDiTConfig
    if network == "dit":
        model = OriginalDiTConfig(SIDE, 4, channels, 16, 1, 2, num_classes=2)
    else:
        model = ClassModelConfig(4, channels, 16, 1, 2, multiple_of=16, input_size=SIDE, num_classes=2)
    config = over(photos, {"train.steps": 1, "train.batch_size": 4})
    latents = AutoencoderConfig("emoji64-vae", 0.196582, 2.149308, 4)
    config = replace(
        config,
        model=model,
        process={"ddpm": DDPMConfig(), "flow": FlowConfig(), "sit": SIT}[process],
        codec=PixelCodecConfig() if codec == "pixels" else latents,
        data=replace(config.data, image_size=SIDE * (1 if codec == "pixels" else 4)),
    )
    ldit.train(config, tmp_path / "run")
    pipe = ldit.load(tmp_path / "run", device="cpu")
    assert pipe.sample(["dog"], steps=2, solver="ddim" if process == "ddpm" else "euler")[0].size == (
        config.data.image_size, config.data.image_size
    )  # fmt: skip


# ---- fine-tuning


LATENTS = OriginalDiTConfig(8, 2, 4, 32, 2, 4, num_classes=5)
FLAGS = ["--train.steps", "2", "--train.batch-size", "4", "--data.image-size", "32", "--train.sample-every", "0"]
CODEC = ["--codec.name", "emoji64-vae", "--codec.factor", "4", "--codec.scale", "0.196582", "--codec.shift", "2.149308"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a DiT file that states no heads, as SiT's train.py writes them, and as an export."""
    base = tmp_path_factory.mktemp("files")
    state = weights(LATENTS)
    torch.save(state, base / "DiT.pt")
    left = argparse.Namespace(model="SiT-S/2", path_type="Linear", prediction="velocity")
    torch.save({"model": state, "ema": state, "args": left}, base / "trained.pt")
    (base / "export").mkdir()
    write_export(base / "export", ModelSpec(LATENTS, DDPMConfig(), AutoencoderConfig()), state.items())
    return base


def begun_with(run: Path) -> dict[str, Tensor]:
    return load_file(step_folder(run, 2) / "ema.safetensors")


def test_a_model_is_a_recipe(files: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ldit train MODEL --data.path PHOTOS`: network, process and codec are the model's, classes and size those of the
    images; the same line resumes."""
    export, run = files / "export", tmp_path / "run"
    command = ["train", str(export), "--data.path", str(photos), "--out", str(run), *FLAGS, *CODEC]
    assert main([*command, "--train.lr", "1e-30"]) == 0
    said = capsys.readouterr().err
    assert "starts from" in said and "2 new ones from the null class" in said
    found, source = begun_with(run), weights(LATENTS)
    assert all(torch.allclose(found[n], source[n]) for n in source if n != "y_embedder.embedding_table.weight")
    config = RunConfig.from_json(json.loads((run / "config.json").read_text()))
    assert (config.model.num_classes, config.model.input_size, config.process) == (2, 8, DDPMConfig())
    assert main([*command, "--train.lr", "1e-30", "--train.steps", "3"]) == 0
    assert step_folder(run, 3).is_dir()


def test_what_a_file_does_not_state(files: Path, photos: Path, tmp_path: Path) -> None:
    """Heads or process: as a recipe it is refused with what to do; with --train.init-from the run's own are taken. What
    the file states is never passed over."""
    with pytest.raises(SourceError, match=r"ldit convert .* EXPORT --heads N"):
        experiment_of(str(files / "DiT.pt"))
    bare = tmp_path / "step.pt"
    bare.write_bytes((files / "DiT.pt").read_bytes())
    with pytest.raises(SourceError, match=r"whether it is a DiT or a SiT; ldit convert .* --process ddpm\|flow"):
        experiment_of(str(bare))
    sizes = {"hidden-size": "32", "depth": "2", "num-heads": "4", "input-size": "8", "num-classes": "2"}
    model = [word for name, value in sizes.items() for word in (f"--model.{name}", value)]
    for recipe, file in (("dit-s-2", files / "DiT.pt"), ("sit-xl-2", bare), ("sit-xl-2", files / "trained.pt")):
        run = tmp_path / f"{recipe}-{file.stem}"
        command = ["train", recipe, "--data.path", str(photos), "--out", str(run), *FLAGS, *CODEC, *model]
        command += ["--train.init-from", str(file), "--train.lr", "1e-30", "--train.precision", "fp32"]
        assert main(command) == 0
        assert torch.allclose(begun_with(run)["blocks.1.mlp.fc1.weight"], weights(LATENTS)["blocks.1.mlp.fc1.weight"])
    other = argparse.Namespace(path_type="Cosine", prediction="velocity")
    torch.save({"model": weights(LATENTS), "args": other}, tmp_path / "gvp.pt")
    spec = ModelSpec(LATENTS, SIT, AutoencoderConfig())
    with pytest.raises(SourceError, match="expected SiT's Linear, GVP, VP"):
        _opened(str(tmp_path / "gvp.pt"), True, spec)
    assert _opened(str(files / "trained.pt"), True, replace(spec, process=DDPMConfig())).spec.process == SIT


def test_models_that_are_no_recipe(tmp_path: Path) -> None:
    """Another network or process than the package's, and text models; SiT's times and a model's own augmentation come
    with it; `~` and folders beside the model are found from anywhere."""
    for record in ({"process": "my.Flow"}, {"network": "my.net"}):
        folder = tmp_path / next(iter(record))
        folder.mkdir()
        spec = ModelSpec(LATENTS, DDPMConfig(), AutoencoderConfig(), training=record)
        write_export(folder, spec, weights(LATENTS).items())
        with pytest.raises(ConfigError, match="not of this package"):
            experiment_of(str(folder))
    told = ClassModelConfig(4, 3, 16, 1, 2, multiple_of=16, input_size=8, num_classes=2, augment_labels=True)
    config = finetune(ModelSpec(told, SIT, PixelCodecConfig()), "x")
    assert (config.objective.augment, config.objective.times) == (0.15, "uniform")
    replace(config, data=replace(config.data, path="x", fit_model=False)).check()
    text = ModelSpec(TextModelConfig(2, 4, 16, 1, 2, cap_feat_dim=8), DDPMConfig(), AutoencoderConfig())
    with pytest.raises(ConfigError, match="does not say what its text encoder is"):
        finetune(text, "x")


def test_a_pipeline_folder_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its autoencoder is named by a whole path, and so is the folder: the run is opened from anywhere."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network = DiTTransformer2DModel(4, 8, 4, 8, 1, sample_size=8, patch_size=2, num_embeds_ada_norm=5)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **kinds)
    DiTPipeline(network, vae, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    config = experiment_of("pipeline").config
    assert isinstance(config, RunConfig) and isinstance(config.codec, AutoencoderConfig)
    assert (config.codec.name, config.codec.factor) == (str(tmp_path / "pipeline/vae"), 2)
    assert config.train.init_from == str(tmp_path / "pipeline")
    assert isinstance(config.model, OriginalDiTConfig) and config.model.variant == "diffusers"
    assert config.data.image_size == 16


def test_a_run_becomes_a_pt_file(files: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of DiT and of SiT: the file is read back as the same network and process, and says what it leaves out."""
    for process in (DDPMConfig(), SIT):
        spec = ModelSpec(LATENTS, process, AutoencoderConfig("/somewhere/vae"))
        folder = tmp_path / process.kind
        folder.mkdir()
        write_export(folder, spec, weights(LATENTS).items(), weights(LATENTS, 2).items())
        out = convert(folder, tmp_path / f"{process.kind}.pt", "pt")
        assert "does not hold the autoencoder /somewhere/vae" in caplog.text
        read = open_source(out, heads=4)
        assert (read.spec.model, read.spec.process) == (LATENTS, process)
        assert all(torch.equal(t, weights(LATENTS, 2)[name]) for name, t in read.tensors(ema=True))


def test_names_that_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for name, words in (
        (str(tmp_path / "empty"), "is not a model"),
        ("tiny-cpuu", "unknown recipe 'tiny-cpuu'"),
        ("runs/absent", "no file or folder 'runs/absent'"),
        (f"{tmp_path}/no.py:recipe", "no file"),
    ):
        assert main(["train", name, "--out", str(tmp_path / "out"), "--data.path", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_a_run_by_its_name_is_not_fine_tuned(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With another --out it is a new run of the same configuration, which a warning says; fewer steps than it has
    leave its configuration as it was; an autoencoder's folder is no model."""
    run, again = tmp_path / "run", tmp_path / "again"
    ldit.train(over(photos, {"train.steps": 2, "model.num_classes": 2}), run)
    flags = ["--train.steps", "1", "--data.path", str(photos)]
    assert main(["train", str(run), "--out", str(again), *flags]) == 0
    assert "not its weights" in capsys.readouterr().err
    assert main(["train", str(run), *flags]) == 0
    said = capsys.readouterr().err
    assert "nothing left to do: step 2 is committed, train.steps is 1" in said and "not its weights" not in said
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 2
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert main(["train", str(vae), "--out", str(again)]) == 2
    assert "is an autoencoder" in capsys.readouterr().err


def test_grids_of_ddpm_are_short(photos: Path) -> None:
    """The published 250 steps are for evaluation; a run's own defaults are kept."""
    from ldit.commands.train_hooks import grid_request, preview_of
    from ldit.config.spec import SamplingConfig

    for sampling, steps in ((None, 20), (SamplingConfig("ddim", 7, 1.0), 7)):
        _, task, _ = started(replace(dit_run(), sampling=sampling))
        task.spec = replace(task.spec, sampling=sampling)
        assert len(preview_of(task).levels) - 1 == steps
        assert len(grid_request(task).levels) - 1 == (250 if sampling is None else 7)
