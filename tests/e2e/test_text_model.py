"""A text model from the original's folder to images, and a small one from training to images."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from smallrun import SIDE, small
from textmodels import CAPTIONS, WIDTH, save_captioned, save_llama, save_tokenizer

import ldit
from ldit.cli.main import main
from ldit.cli.original.sample import run as original_sample
from ldit.commands.train import train
from ldit.config.model import TextModelConfig
from ldit.config.run import RunConfig
from ldit.config.sections import TextConfig
from ldit.errors import CodecError, ConfigError, DataError, RequestError
from ldit.nn.build import build_model
from ldit.nn.dit import init_parameter
from ldit.nn.rope import raster_table
from ldit.rng import generator

SIZES = {"256x256": (32, 32), "512x128": (16, 64), "128x512": (64, 16), "256x128": (16, 32)}
"""Width x height in pixels -> height and width of the latent."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("lm") / "llama")


def random_weights(config: TextModelConfig) -> dict[str, torch.Tensor]:
    """Fresh weights, with small random numbers in place of the zeros that hide blocks and text."""
    model = build_model(config)
    for name, p in model.named_parameters():
        init_parameter(name, p, lambda name: generator(1, "init", 0, name))
        if not p.any():
            torch.nn.init.normal_(p, 0.0, 0.02, generator=generator(2, "init", 0, name))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def original_folder(folder: Path, llama: Path, **settings: Any) -> Path:
    """A folder of the original's text model. Its tokenizer lies elsewhere than its language model."""
    folder.mkdir(parents=True)
    tokenizer = folder.parent / "tokenizer"
    save_tokenizer(tokenizer)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "qk_norm": True}
    config = TextModelConfig(**sizes, max_seq_len=288, cap_feat_dim=WIDTH, rope_scaling_factor=2.0)
    values = {"model": "DiT_Llama", "vae": "ema", "lm": str(llama), "tokenizer_path": str(tokenizer), **sizes}
    args = argparse.Namespace(**{**values, "rope_scaling_factor": 2.0, "precision": "bf16", **settings})
    torch.save(args, folder / "model_args.pth")
    torch.save(random_weights(config), folder / "consolidated_ema.00-of-01.pth")
    return folder


def test_the_originals_folder_samples_at_any_aspect(llama: Path, tmp_path: Path) -> None:
    folder = original_folder(tmp_path / "text" / "0001000", llama)
    pipe = ldit.load(folder)
    model = pipe.spec.model
    assert isinstance(model, TextModelConfig) and model.rope_scaling_factor == 2.0 and model.input_size == 32
    for size, (height, width) in SIZES.items():
        out = tmp_path / f"{size}.safetensors"
        flags = ["--ckpt", str(folder), "--caption", *CAPTIONS[:2], "--resolution", size, "--num_sampling_steps", "3"]
        assert original_sample([*flags, "--precision", "fp32", "--latents_out", str(out)]) == 0
        found = load_file(out)["latents"]
        assert found.shape == (2, 4, height, width)
        # The same by the pipeline, with keywords; each image alone.
        more = {"steps": 3, "height": 8 * height, "width": 8 * width, "guidance": 4.0, "guidance_channels": 3}
        alone = pipe.sample_latents(CAPTIONS[1], seed=1, **more)
        torch.testing.assert_close(alone[0], found[1], rtol=1e-4, atol=1e-4)

    # The prompt, the negative prompt and the positions have an effect.
    def sampled(**changes: Any) -> torch.Tensor:
        return pipe.sample_latents(**{"prompts": "a red cat", "steps": 2, "seed": 4, "guidance": 4.0, **changes})

    base = sampled()
    assert base.equal(sampled(negative_prompts=""))
    for changes in ({"prompts": "the green dog"}, {"negative_prompt": "a moon"}, {"negative_prompts": ["a moon"]}):
        assert not torch.allclose(base, sampled(**changes))
    # Of several negative prompts each image has its own.
    each = sampled(prompts=["a red cat", "a moon"], negative_prompts=["the sun", ""])
    assert torch.allclose(each[0], sampled(negative_prompt="the sun")[0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(each[1], sampled(prompts="a moon", seed=5)[0], rtol=1e-4, atol=1e-4)
    table = pipe.model.positions(torch.zeros(1, 4, 32, 32))
    assert table.equal(raster_table(288, 8, torch.device("cpu"), 2.0)) and not table.equal(
        raster_table(288, 8, torch.device("cpu"))
    )
    # Converted to the original's layout and back, it is the same model.
    assert main(["convert", str(folder), str(tmp_path / "ours"), "--to", "ldit"]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "original"]) == 0
    again = ldit.load(tmp_path / "theirs")
    assert again.spec.model == model and again.spec.conditioner == pipe.spec.conditioner
    assert base.equal(again.sample_latents("a red cat", steps=2, seed=4, guidance=4.0))


def test_what_a_text_model_refuses(llama: Path, tmp_path: Path) -> None:
    pipe = ldit.load(original_folder(tmp_path / "text" / "x", llama))
    for keywords, said in (
        ({}, "name at least one prompt"),
        ({"prompts": []}, "name at least one prompt"),
        ({"prompts": ["a", 3]}, "expected a text, got 3"),
        ({"prompts": "a\0b"}, "holds characters that are no text"),
        ({"prompts": "a" * 70000}, "70,000 characters"),
        ({"prompts": "a", "num": 2}, "makes one image a prompt"),
        ({"prompts": "a", "prompts_file": tmp_path / "no"}, "not both"),
        ({"prompts_file": tmp_path / "no"}, "cannot read"),
        ({"prompts": "a", "negative_prompts": [1]}, "negative_prompts: expected a text"),
        ({"prompts": "a", "negative_prompts": ["a", "b"]}, "2 for 1 prompts; give one, or one each"),
        ({"prompts": "a", "proportional_attention": True}, "not for text models"),
    ):
        with pytest.raises(RequestError, match=said):
            pipe.sample_latents(**{"steps": 1, **keywords})
    lines = tmp_path / "prompts.txt"
    lines.write_bytes(b"\xef\xbb\xbfa cat\n\n  the dog \n")
    assert len(pipe.sample_latents(prompts_file=lines, steps=1)) == 2
    lines.write_bytes(b"a cat\n\xff\n")
    with pytest.raises(RequestError, match="line 2: not UTF-8"):
        pipe.sample_latents(prompts_file=lines, steps=1)
    with pytest.raises(RequestError, match="this model takes no text"):
        ldit.load("emoji64-class-xs").sample_latents(prompts="a", steps=1)


def text_run(data: Path, llama: Path, changes: dict[str, Any] | None = None, cache: str = "") -> RunConfig:
    """A small run of a pixel text model."""
    base = small({"data.path": str(data), "train.batch_size": 4, "train.checkpoint_every": 2, **(changes or {})})
    model = TextModelConfig(
        patch_size=2, in_channels=3, dim=16, n_layers=1, n_heads=2, multiple_of=16,
        max_seq_len=SIDE // 2 * (SIDE // 2 + 1), cap_feat_dim=WIDTH, qk_norm=True,
    )  # fmt: skip
    text = TextConfig(str(llama), max_tokens=8, dropout=0.25, prompts=("a red cat", "the sun"), cache=cache)
    return replace(base, model=model, text=text)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_training_resumes_exactly_and_samples(llama: Path, tmp_path: Path) -> None:
    data = save_captioned(tmp_path / "data", side=SIDE)
    whole = train(
        text_run(data, llama, {"train.steps": 6, "heldout.every": 3, "data.heldout": "0.2"}), tmp_path / "whole"
    )
    part = tmp_path / "part"
    for steps in (3, 6):
        train(text_run(data, llama, {"train.steps": steps, "heldout.every": 3, "data.heldout": "0.2"}), part)
    assert losses(whole) == losses(part)
    ours, theirs = (
        load_file(sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors") for run in (whole, part)
    )
    assert all(ours[name].equal(theirs[name]) for name in ours)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert sum("eps_mse" in row for row in rows) == 2
    # From the run to images: a grid, single files with their settings, and a set.
    grid, singles = tmp_path / "grid.png", tmp_path / "singles"
    flags = ["--prompts", "a red cat", "the green dog", "a red cat", "--steps", "2", "--solver", "ddim"]
    assert main(["sample", str(whole), *flags, "--image-save-path", str(grid), "--out", str(singles)]) == 0
    names = sorted(path.name for path in singles.iterdir())
    assert names == ["00000_a-red-cat_seed0.png", "00001_the-green-dog_seed1.png", "00002_a-red-cat_seed2.png"]
    kept = json.loads(Image.open(singles / names[1]).text["ldit"])  # type: ignore[attr-defined]
    assert kept["prompts"] == ["a red cat", "the green dog"] and (kept["label"], kept["labels"]) == (1, [0, 1, 0])
    made = tmp_path / "set"
    assert (
        main(["sample", str(whole), *flags[:3], "--steps", "2", "--num", "5", "--batch-size", "2", "--out", str(made)])
        == 0
    )
    described = json.loads((made / "samples.json").read_text())
    assert described["class_names"] == ["a red cat", "the green dog"] and described["labels"] == [0, 1, 0, 1, 0]
    assert len(described["text"]["encoder"]) == 64
    pipe = ldit.load(whole)
    one = np.asarray(pipe(["the green dog"], seed=3, steps=2)[0])
    files = sorted(made.rglob("*.png"))
    assert np.array_equal(one, np.asarray(Image.open(files[3])))


def test_a_cache_takes_the_encoders_place(llama: Path, tmp_path: Path) -> None:
    data, own = save_captioned(tmp_path / "data", side=SIDE), tmp_path / "own"
    shutil.copytree(llama, own)
    flags = ["--text", "--encoder", str(own), "--max-tokens", "8", "--image-size", str(SIDE)]
    assert main(["encode", str(data), "--out", str(tmp_path / "texts"), *flags]) == 0

    def config(steps: int, **text: Any) -> RunConfig:
        base = text_run(data, own, {"train.steps": steps})
        return replace(base, text=replace(base.text, prompts=(), **text))

    train(config(5), tmp_path / "live")
    train(config(3, cache=str(tmp_path / "texts")), tmp_path / "cached")
    # What may change in a resumed run, and what may not.
    said: list[tuple[dict[str, Any], str]] = [
        ({"dropout": 0.5}, "text.dropout 0.25 -> 0.5"),
        ({"max_tokens": 9}, "text.max_tokens 8 -> 9"),
        ({"encoder": str(llama)}, "text.encoder"),
        ({"tokenizer": str(llama)}, "text.tokenizer"),
        ({"precision": "bf16"}, "text.precision 'fp32' -> 'bf16'"),
    ]
    for changes, words in said:
        with pytest.raises(ConfigError, match=f"another run.*{words}"):
            train(config(5, **changes), tmp_path / "cached")
    # With the cache the encoder is not needed; without it, it is.
    shutil.rmtree(own)
    train(config(5, cache=str(tmp_path / "texts")), tmp_path / "cached")
    assert losses(tmp_path / "live") == losses(tmp_path / "cached")
    with pytest.raises(CodecError, match=r"own' was not found"):
        train(config(6), tmp_path / "cached")
    # A cache of another encoder is refused, and one that lacks texts is completed by the encoder.
    other = save_llama(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(CodecError, match=r"texts was made with encoder of fingerprint \w{16}, the run has"):
        train(text_run(data, other, {"train.steps": 1}, cache=str(tmp_path / "texts")), tmp_path / "new")
    shutil.copytree(llama, own)
    rows = (data / "metadata.jsonl").read_text().replace("a moon", "a red moon")
    (data / "metadata.jsonl").write_text(rows)
    train(config(1, cache=str(tmp_path / "texts")), tmp_path / "lacking")
    # Another encoder at the same place is noticed.
    shutil.rmtree(own)
    shutil.copytree(other, own)
    with pytest.raises(DataError, match="the text encoder differs"):
        train(config(2), tmp_path / "lacking")


def test_prompts_that_are_listed_twice_and_models_without_a_null_text(llama: Path, tmp_path: Path) -> None:
    data = save_captioned(tmp_path / "data", side=SIDE)
    config = text_run(data, llama, {"train.steps": 1})
    run = train(replace(config, text=replace(config.text, dropout=0.0)), tmp_path / "run")
    lines = ["a red cat", "the sun", "a red cat", "a moon"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    flags = [
        "--prompts-file",
        str(tmp_path / "prompts.txt"),
        "--steps",
        "1",
        "--num",
        "6",
        "--out",
        str(tmp_path / "set"),
    ]
    assert main(["sample", str(run), *flags]) == 2  # the published default is guided
    assert main(["sample", str(run), *flags, "--guidance", "1", "--batch-size", "4"]) == 0
    made = json.loads((tmp_path / "set" / "samples.json").read_text())
    assert [made["class_names"][label] for label in made["labels"]] == [*lines, *lines[:2]]
    with pytest.raises(RequestError, match="no null class or text"):
        ldit.load(run)("a red cat", guidance=2, steps=1)


def test_a_prompt_that_a_cache_lacks_needs_the_encoder(llama: Path, tmp_path: Path) -> None:
    data, own = save_captioned(tmp_path / "data", side=SIDE), tmp_path / "own"
    shutil.copytree(llama, own)
    flags = ["--text", "--encoder", str(own), "--max-tokens", "8", "--image-size", str(SIDE)]
    assert main(["encode", str(data), "--out", str(tmp_path / "texts"), *flags]) == 0
    config = text_run(data, own, {"train.steps": 2, "train.sample_every": 1}, cache=str(tmp_path / "texts"))
    train(config, tmp_path / "run")  # the captions from the cache, the prompts of the grid by the encoder
    assert len(list((tmp_path / "run/samples").iterdir())) == 2
    shutil.rmtree(own)
    with pytest.raises(CodecError, match="own' was not found"):  # before the run is touched
        train(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_fine_tuning_starts_from_the_model(llama: Path, tmp_path: Path) -> None:
    data = save_captioned(tmp_path / "data", side=SIDE)
    base = train(text_run(data, llama, {"train.steps": 2}), tmp_path / "base")
    flags = ["--data.path", str(data), "--train.steps", "2", "--train.batch-size", "4", "--train.sample-every", "0"]
    assert main(["train", str(base / "checkpoints/step-00000002"), "--out", str(tmp_path / "tuned"), *flags]) == 0
    config = RunConfig.from_json(json.loads((tmp_path / "tuned/config.json").read_text()))
    assert config.text == TextConfig(str(llama), max_tokens=8) and not config.data.flip
    assert config.model == text_run(data, llama).model and len(ldit.load(tmp_path / "tuned")("a red cat", steps=2)) == 1


def test_captions_are_drawn_by_position(llama: Path, tmp_path: Path) -> None:
    from ldit.data.loader import load_batch
    from ldit.data.source import open_run_data
    from ldit.training.tasks.diffusion import open_diffusion

    data = save_captioned(tmp_path / "data", side=SIDE)
    config = text_run(data, llama)
    samples, _ = open_run_data(config.data, captions=True)
    task = open_diffusion(ldit.Experiment(config=config), samples, torch.device("cpu"))
    texts = [*task.conditioner.texts, None]  # type: ignore[union-attr]
    batch = load_batch(samples, range(4000), [0] * 4000, None)
    drawn = [texts[label] for label in task.draw_labels(batch).tolist()]
    counts = {text: drawn.count(text) for text in set(drawn)}
    # 0.25 are dropped; of the others 3/4 have the first caption. Four standard deviations of a share are 0.03.
    expected = {None: 0.25, "a red cat": 0.5625, "the a red cat": 0.1875}
    assert counts.keys() == expected.keys()
    assert all(abs(counts[text] / 4000 - share) < 0.032 for text, share in expected.items())
    assert task.draw_labels(replace(batch.micro(100).__next__())).tolist() == task.draw_labels(batch)[:100].tolist()
