"""Hub ids through the client's own cache, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, ldit
from ldit.errors import SourceError
try:
    print(ldit.load(sys.argv[1]).spec.model.num_classes)
except SourceError as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """What a finished download leaves: refs/main and a snapshot, here with the model in a sub-folder."""
    from safetensors.torch import save_file

    from ldit.config.model import ClassModelConfig
    from ldit.config.spec import DDPMConfig, ModelSpec, PixelCodecConfig
    from ldit.nn.build import build_model

    model = ClassModelConfig(
        dim=32,
        n_layers=1,
        n_heads=2,
        multiple_of=16,
        input_size=8,
        in_channels=3,
        num_classes=7,
        class_dropout_prob=0.1,
    )
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40) / "sub" / "model"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    spec = ModelSpec(model, DDPMConfig(), PixelCodecConfig())
    (snapshot / "config.json").write_text(json.dumps(spec.to_json()))
    save_file(build_model(model).state_dict(), snapshot / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("org/name/sub/model", "7"),
        ("org/name/other", "org/name on the Hub has no folder 'other'"),
        ("org/absent", "no file or folder 'org/absent', and the Hub did not give it (HF_HUB_OFFLINE is set)"),
    ],
)
def test_hub_ids_offline(cache: Path, source: str, said: str) -> None:
    env = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CODE, source]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith(said), done.stdout
