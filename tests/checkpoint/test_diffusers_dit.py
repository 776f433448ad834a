"""DiTPipeline folders as diffusers itself writes them: the same numbers from our network, and what is refused."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldit.checkpoint.open import open_source
from ldit.cli.main import main
from ldit.commands.convert import convert
from ldit.config.assets import imagenet_names
from ldit.config.model import OriginalDiTConfig
from ldit.config.spec import AutoencoderConfig, DDPMConfig
from ldit.errors import RequestError
from ldit.nn.dit_original import position_table
from ldit.pipeline.load import load

Fault = Callable[..., str]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LABELS = {str(i): name for i, name in enumerate(["ant, Formicidae", "bee", "cat", "dog", "eel"])}
SIZES: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}


@pytest.fixture(scope="session")
def theirs() -> Any:
    """diffusers' own network with random weights and, as in every published one, one set of embedders."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(**SIZES).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    blocks = network.transformer_blocks
    for block in blocks:
        block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return network


@pytest.fixture(scope="session")
def saved(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **kinds)
    folder = tmp_path_factory.mktemp("saved") / "dit"
    DiTPipeline(
        theirs, vae.eval(), DDIMScheduler(clip_sample=False), id2label={int(k): v for k, v in LABELS.items()}
    ).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": LABELS}))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def inputs(side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return torch.randn(4, 4, side, side, generator=drawn), torch.tensor([999, 500, 37, 0]), torch.tensor([0, 3, 5, 4])


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_the_spec(saved: Path) -> None:
    spec = open_source(saved).spec
    expected = OriginalDiTConfig(8, 2, 4, 64, 3, 4, 4.0, 0.1, 5, True, "diffusers")
    assert (spec.model, spec.process) == (expected, DDPMConfig())
    assert spec.codec == AutoencoderConfig("vae", 0.5, 0.0, 2)
    assert spec.class_names == tuple(LABELS.values())


def test_the_same_numbers(saved: Path, theirs: Any) -> None:
    """Both compute in fp32, in another order of operations."""
    pipe, (x, t, y) = load(saved, device="cpu"), inputs()
    expected = theirs(x, timestep=t, class_labels=y).sample
    assert relative(pipe.model(x, t, y), expected) < 1e-5
    assert relative(pipe.model(x, t.float(), y), expected) < 1e-5


def test_the_same_numbers_in_float64(saved: Path, theirs: Any) -> None:
    """Where fp32's rounding hides nothing: the epsilon of a block's second norm, 1e-5 and not 1e-6, is 4.5e-6 of a
    variance near 1. At t = 0 all features of time are exact; the table of positions is fp32's on both sides."""
    pipe, (x, _, y) = load(saved, device="cpu", dtype=torch.float64), inputs()
    expected = copy.deepcopy(theirs).double()(x.double(), timestep=torch.zeros(4), class_labels=y).sample
    assert relative(pipe.model(x.double(), torch.zeros(4), y), expected) < 5e-7


def test_the_variant_matters(saved: Path, theirs: Any) -> None:
    """With the original's frequencies of time the outputs are others: folders of 2023 take those."""
    published = Path(shutil.copytree(saved, saved.parent / "published"))
    edit(published / "transformer/config.json", _class_name="Transformer2DModel", cross_attention_dim=None)
    pipe, (x, t, y) = load(published, device="cpu"), inputs()
    assert pipe.spec.model.variant == "original"  # type: ignore[union-attr]
    out, expected = pipe.model(x, t, y), theirs(x, timestep=t, class_labels=y).sample
    assert relative(out, expected) > 1e-3
    # At t = 0 no frequency counts, so only the epsilon of the second norm is left: 1e-5 beside a variance near 1.
    assert 0 < relative(out[3], expected[3]) < 1e-3


def test_positions_are_the_networks() -> None:
    from ldit.checkpoint.layouts.diffusers_dit import _positions

    for side, dim in ((4, 64), (16, 1152)):
        assert torch.equal(_positions(side, dim), position_table(side, side, dim))


def test_sharded_and_pickled_weights(folder: Path, saved: Path, theirs: Any) -> None:
    x, t, y = inputs()
    expected = load(saved, device="cpu").model(x, t, y)
    shutil.rmtree(folder / "transformer")
    theirs.save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 2
    assert relative(load(folder, device="cpu").model(x, t, y), expected) < 1e-6
    shutil.rmtree(folder / "transformer")
    theirs.save_pretrained(folder / "transformer", safe_serialization=False)
    assert relative(load(folder, device="cpu").model(x, t, y), expected) < 1e-6
    assert open_source(folder).shapes(True) == open_source(saved).shapes(True)


def test_shapes_without_reading(saved: Path) -> None:
    source = open_source(saved)
    assert source.shapes(True) == {name: (tuple(t.shape), "fp32") for name, t in source.tensors(True)}
    assert source.has_raw() and not source.has_ema()
    source.verify()


def test_it_samples_with_its_own_codec(saved: Path, tmp_path: Path) -> None:
    pipe = load(saved, device="cpu")
    (image,) = pipe(["bee"], steps=2)
    assert image.size == (16, 16)
    images = pipe([0, "eel"], steps=4, init_image=image, strength=0.6)
    assert len(images) == 2
    with pytest.raises(RequestError, match="unknown class 'fox'"):
        pipe(["fox"])


def test_a_image_is_encoded_to_the_posteriors_scaled_mean(saved: Path) -> None:
    from diffusers import AutoencoderKL

    pipe = load(saved, device="cpu")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    vae = AutoencoderKL.from_pretrained(saved / "vae").eval()
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mean * 0.5
    assert relative(pipe.codec.encode(images), expected) < 1e-5
    assert relative(pipe.codec.decode(expected), vae.decode(expected / 0.5).sample.detach()) < 1e-5


def test_commands(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = tmp_path / "grid.png"
    command = ["sample", "--ckpt", str(saved), "--class-labels", "ant", "--steps", "2", "--device", "cpu"]
    assert main([*command, "--image-save-path", str(grid)]) == 0 and grid.exists()
    assert main(["info", str(saved), "--json", "--verify"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["kind"], report["weights"], report["verified"]) == ("diffusers", ["raw"], True)
    assert main([*command, "--process", "flow", "--latents-out", str(tmp_path / "x.pt")]) == 2
    assert "states its process itself" in capsys.readouterr().err


def test_our_layout_keeps_its_numbers_and_codec(saved: Path, tmp_path: Path, fault: Fault) -> None:
    out = convert(saved, tmp_path / "ours")
    x, t, y = inputs()
    pipe = load(out, device="cpu")
    assert relative(pipe.model(x, t, y), load(saved, device="cpu").model(x, t, y)) < 1e-6
    assert pipe.spec.codec == AutoencoderConfig("codec", 0.5, 0.0, 2) and pipe.codec.decode(x).shape == (4, 3, 16, 16)
    assert "variant 'diffusers'" in fault(convert, saved, tmp_path / "x.pt", "pt")


def test_imagenet_names_are_our_table(folder: Path) -> None:
    edit(folder / "transformer/config.json", num_embeds_ada_norm=1000)
    labels = {str(i): f"{name}, more" for i, name in enumerate(imagenet_names())}
    edit(folder / "model_index.json", id2label=labels)
    assert open_source(folder).spec.class_names == imagenet_names()
    edit(folder / "model_index.json", id2label=None)
    assert open_source(folder).spec.class_names == imagenet_names()


@pytest.mark.parametrize(
    ("file", "keys", "said"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "only a DiTPipeline is read, got 'Stable"),
        ("model_index.json", {"id2label": {"0": "ant"}}, "id2label: expected a name for each of the 5 classes"),
        ("model_index.json", {"id2label": {**LABELS, "4": 3}}, "id2label: names must be texts"),
        ("model_index.json", {"id2label": [1]}, "id2label"),
        ("transformer/config.json", {"_class_name": "PixArtTransformer2DModel"}, "_class_name: expected DiTTrans"),
        ("transformer/config.json", {"out_channels": 5}, "out_channels: expected 4 or 8, got 5"),
        ("transformer/config.json", {"norm_eps": 1e-3}, "norm_eps"),
        ("transformer/config.json", {"norm_type": "ada_norm_single"}, "norm_type"),
        ("transformer/config.json", {"activation_fn": "geglu"}, "activation_fn"),
        ("transformer/config.json", {"cross_attention_dim": 768}, "cross_attention_dim"),
        ("transformer/config.json", {"num_layers": 10**9}, "model.depth"),
        ("transformer/config.json", {"novelty": 1}, "unknown key 'novelty'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, "beta_schedule: only linear is read"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 4000}, "num_train_timesteps: only 1000"),
        ("vae/config.json", {"scaling_factor": "big"}, "scaling_factor must be a number"),
        ("vae/config.json", {"block_out_channels": []}, "block_out_channels a list"),
    ],
)
def test_configurations_at_fault(folder: Path, file: str, keys: dict[str, Any], said: str, fault: Fault) -> None:
    edit(folder / file, **keys)
    message = fault(open_source, folder)
    assert said in message and str(folder / file) in message


@pytest.mark.parametrize("file", ["transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_parts_that_are_missing(folder: Path, file: str, fault: Fault) -> None:
    (folder / file).unlink()
    assert f"{folder / file} is missing" in fault(open_source, folder)


BLOCK = "transformer_blocks.1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {f"{BLOCK}.norm1.emb.class_embedder.embedding_table.weight": torch.zeros(6, 64)},
            "differs from another block",
        ),
        ({f"{BLOCK}.norm1.emb.timestep_embedder.linear_1.bias": torch.ones(64)}, "differs from another block"),
        ({f"{BLOCK}.attn1.to_q.weight": None}, "blocks.1.attn.qkv.weight is made of to_q, to_k and to_v, of which 2"),
        ({f"{BLOCK}.attn1.to_q.weight": torch.zeros(64, 3)}, "blocks.1.attn.qkv.weight"),
        ({f"{BLOCK}.ff.net.2.bias": None}, "missing 1 entries (blocks.1.mlp.fc2.bias)"),
        ({f"{BLOCK}.attn2.to_q.weight": torch.zeros(64, 64)}, "unknown 1 entries"),
        ({"stray": torch.zeros(1)}, "unknown 1 entries (stray)"),
        ({"proj_out_2.weight": torch.zeros(64, 32)}, "final_layer.linear.weight has shape (64, 32)"),
    ],
)
def test_weights_at_fault(folder: Path, change: dict[str, Tensor | None], said: str, fault: Fault) -> None:
    state = {**load_file(folder / WEIGHTS), **change}
    save_file({name: t for name, t in state.items() if t is not None}, folder / WEIGHTS)
    assert said in fault(load, folder, "cpu")


def test_no_weights(folder: Path, fault: Fault) -> None:
    (folder / WEIGHTS).unlink()
    assert "has neither diffusion_pytorch_model.safetensors" in fault(load, folder, "cpu")


def test_a_table_of_positions_from_an_old_version(folder: Path, saved: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({**state, "pos_embed.pos_embed": torch.zeros(1, 16, 64)}, folder / WEIGHTS)
    assert load(folder, device="cpu").model.pos_embed.equal(position_table(4, 4, 64))  # type: ignore[operator]


@pytest.mark.parametrize("key", ["clip_sample", "thresholding", "rescale_betas_zero_snr"])
def test_what_changes_the_estimates_is_refused(folder: Path, fault: Any, key: str) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", **{key: True})
    assert f"{key}: only False is read, got True" in fault(open_source, folder)


def test_another_grid_is_said_not_to_be_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", timestep_spacing="trailing", steps_offset=1)
    open_source(folder)
    assert "timestep_spacing 'trailing', steps_offset 1" in caplog.text and "--grid" in caplog.text
