"""Weight files: kinds, names, shapes; damaged and hostile ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pickles
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.config.spec import AutoencoderConfig
from ldit.errors import CodecError

STEM = "diffusion_pytorch_model"
NAME = "encoder.mid_block.attentions.0"
GUARD = pickles.Guard()


@pytest.fixture
def refused(folder: Path, config: AutoencoderConfig) -> Callable[[], str]:
    def opened() -> str:
        with pytest.raises(CodecError) as caught:
            AutoencoderCodec(config, folder)
        message = str(caught.value)
        assert "\n" not in message and str(folder) in message
        return message

    return opened


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_old_attention_as_convolutions(
    kind: str, folder: Path, saved: Path, config: AutoencoderConfig, state: dict[str, Tensor]
) -> None:
    """As latent diffusion wrote them: query, key, value, proj_attn, of shape (n, n, 1, 1)."""
    z = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = AutoencoderCodec(config, saved).decode(z)
    for part in ("encoder", "decoder"):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            prefix = f"{part}.mid_block.attentions.0"
            state[f"{prefix}.{old}.weight"] = state.pop(f"{prefix}.{new}.weight")[:, :, None, None]
            state[f"{prefix}.{old}.bias"] = state.pop(f"{prefix}.{new}.bias")
    (folder / f"{STEM}.safetensors").unlink()
    if kind == "bin":
        torch.save(state, folder / f"{STEM}.bin")
    else:
        save_file(state, folder / f"{STEM}.safetensors")
    assert torch.equal(AutoencoderCodec(config, folder).decode(z), expected)


def test_opened_without_a_second_copy(saved: Path, config: AutoencoderConfig) -> None:
    """Matrices and vectors of fp32 files stay in the file, mapped."""
    network = AutoencoderCodec(config, saved)._network
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in network.parameters())
    mapped = [parameter for parameter in network.parameters() if parameter.ndim < 4]
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if str(saved) in line]
    places = [(int(first, 16), int(last, 16)) for first, last in ranges]
    assert all(any(first <= p.data_ptr() < last for first, last in places) for p in mapped)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(f"{NAME}.to_q.weight"), f"missing 1 entries ({NAME}.to_q.weight)"),
        (lambda s: s.update({"decoder.extra": torch.ones(2)}), "unknown 1 entries (decoder.extra)"),
        (
            lambda s: s.update({"quant_conv.bias": torch.ones(9)}),
            "quant_conv.bias has shape (9,), the model needs (8,)",
        ),
        (lambda s: s.update({"quant_conv.weight": torch.ones(8, 8)}), "quant_conv.weight has shape (8, 8)"),
        (
            lambda s: s.update({f"{NAME}.query.bias": s[f"{NAME}.to_q.bias"].clone()}),
            f"{NAME}.to_q.bias occurs twice",
        ),
        (lambda s: s.update({"quant_conv.bias": torch.ones(8, dtype=torch.int64)}), "quant_conv.bias is a torch.int64"),
        (dict.clear, "missing 120 entries"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tensors_that_do_not_fit(
    kind: str,
    change: Callable[[dict[str, Tensor]], None],
    said: str,
    folder: Path,
    state: dict[str, Tensor],
    refused: Callable[[], str],
) -> None:
    change(state)
    said = said.replace("120", str(len(load_file(folder / f"{STEM}.safetensors"))))
    (folder / f"{STEM}.safetensors").unlink()
    if kind == "bin":
        torch.save(state, folder / f"{STEM}.bin")
    else:
        save_file(state, folder / f"{STEM}.safetensors")
    assert said in refused()


def test_missing_and_damaged_files(folder: Path, refused: Callable[[], str]) -> None:
    path = folder / f"{STEM}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{STEM}.safetensors is damaged" in refused()
    path.write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])
    assert f"{STEM}.safetensors is damaged" in refused()
    path.unlink()
    assert f"neither {STEM}.safetensors, nor its shards, nor {STEM}.bin" in refused()
    (folder / f"{STEM}.bin").write_bytes(b"x" * 100)
    assert f"{STEM}.bin" in refused()
    index = folder / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"quant_conv.bias": "../secret.safetensors"}}))
    assert "'../secret.safetensors' is not the name of a weight file" in refused()
    index.write_text(json.dumps({"weight_map": {"quant_conv.bias": f"{STEM}-00001-of-00002.safetensors"}}))
    assert f"{STEM}-00001-of-00002.safetensors is missing" in refused()


@pytest.mark.parametrize("form", ["raw with protocol", "zip"])
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "in a Namespace", "torch class", "numpy"])
def test_pickled_code_does_not_run(
    name: str, form: str, folder: Path, tmp_path: Path, refused: Callable[[], str]
) -> None:
    sentinel = tmp_path / "ran"
    (folder / f"{STEM}.safetensors").unlink()
    pickles.hostile(folder / f"{STEM}.bin", pickles.payloads(sentinel)[name], form)
    refused()  # imports what it takes: importing is executing
    with GUARD as heard:
        message = refused()
    assert f"{STEM}.bin" in message and not sentinel.exists() and not heard


@pytest.mark.parametrize("how", ["expanded", "shared"])
def test_pickles_that_claim_more_than_they_hold(
    how: str, folder: Path, state: dict[str, Tensor], refused: Callable[[], str]
) -> None:
    """One number seen as a matrix, or the same numbers under many names: a small file would fill the memory."""
    (folder / f"{STEM}.safetensors").unlink()
    if how == "expanded":
        state = {name: torch.ones(()).expand(tensor.shape) for name, tensor in state.items()}
    else:
        numbers = torch.ones(max(tensor.numel() for tensor in state.values()))
        state = {name: numbers[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}
    torch.save(state, folder / f"{STEM}.bin")
    assert "claim" in refused()


def test_a_huge_configuration_over_a_small_file(
    folder: Path, edit: Callable[..., None], refused: Callable[[], str], config: AutoencoderConfig
) -> None:
    edit(block_out_channels=[10**9] * 4)
    assert "block_out_channels: must be 1 to 8192, got 1000000000" in refused()
    edit(block_out_channels=[1024] * 4, layers_per_block=8)  # within bounds: on the meta device, it costs nothing
    assert "has shape" in refused()
