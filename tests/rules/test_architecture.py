"""Who may import whom, deferred imports too; and what each room may use from outside."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "ldit"

GROUND = {"errors", "precision", "readable", "version"}
_BASE = {"config", "rng", "log"}
_MODEL = {"nn", "diffusion", "sampling", "codecs"}
_FILES = {"storage", "data", "parallel", "checkpoint"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "precision": set(),
    "readable": set(),
    "version": set(),
    "rng": set(),
    "log": set(),
    "figure": set(),
    "config": set(),
    "storage": {"log"},
    "track": {"config", "log", "storage"},
    "nn": {"config"},
    "diffusion": {"config", "rng"},
    "sampling": {"nn", "diffusion", "config", "rng"},
    "codecs": {"config", "log", "nn", "storage"},
    "data": {"config", "rng", "log", "storage"},
    "parallel": {"config", "log", "nn"},
    "checkpoint": {"config", "rng", "log", "parallel", "storage"},
    "pipeline": _BASE | _MODEL | _FILES,
    "training": _BASE | _MODEL | _FILES,
    "eval": _BASE | _MODEL | _FILES | {"figure", "pipeline", "training"},
    "bench": _BASE | _MODEL | _FILES | {"training"},
    "commands": _BASE | _MODEL | _FILES | {"track", "figure", "pipeline", "training", "eval", "bench"},
    "cli": {"commands", "pipeline", "config", "log", "storage"},
}
OUTSIDE: dict[str, set[str]] = {  # package: the rooms that may import it
    "torchvision": set(),
    "diffusers": {"codecs"},
    "transformers": {"codecs"},
    "gradio": {"web"},
    "tyro": {"cli"},
    "safetensors": {"storage", "data"},
    "huggingface_hub": {"storage"},
    "pickle": {"storage"},
    "matplotlib": {"figure", "commands", "eval"},
    "tensorboard": {"track"},
    "wandb": {"track"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module named by an import statement anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_looks_upstairs(path: Path) -> None:
    own = room(path)
    if own in ("__init__", "__main__"):
        return
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("ldit.")}
    assert ours - GROUND - {own, "__version__"} <= ALLOWED[own]
    if own in ("config", "errors"):
        assert not {"torch", "ldit.precision"} & imports(path) and "torch" not in {
            name.split(".")[0] for name in imports(path)
        }
    for package, rooms in OUTSIDE.items():
        if package in {name.split(".")[0] for name in imports(path)}:
            assert own in rooms, f"{package} is not for {own}"


def test_pickles_open_in_one_room() -> None:
    users = [p for p in modules() if "torch.load(" in p.read_text() or "pickle.load" in p.read_text()]
    assert [p.name for p in users] == ["pickled.py"]


def test_files_and_functions_stay_small() -> None:
    for path in modules():
        lines = path.read_text().splitlines()
        assert len(lines) <= 380, f"{path}: {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                assert node.end_lineno - node.lineno < 75, f"{path}: {node.name}"


def test_networks_need_torch_alone() -> None:
    code = (
        "import ldit.nn.dit, sys; print([m for m in ('diffusers', 'safetensors', 'PIL', 'tyro') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
