"""tools/house.py and tools/first_step.py find what they count, in small packages that have one of each."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
house, first_step = (
    SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / f"{n}.py"))) for n in ("house", "first_step")
)

PACKAGE = {
    "src/ldit/__init__.py": '__version__ = "1"\n',
    "src/ldit/errors.py": "# the largest file\n" * 50,
    "src/ldit/config/model.py": """
class ModelConfig:
    num_classes: int = 0

    @property
    def null_class(self):
        return self.num_classes

    def check(self):
        pass
""",
    "src/ldit/diffusion/build.py": "def build(config):\n    return isinstance(config, DDPMConfig)\n",
    "src/ldit/nn/one.py": "import ldit.nn.two\nfrom ldit import __version__\n\n\nclass DiT:\n    pass\n",
    "src/ldit/nn/two.py": "from ldit.nn import one\n\n\nclass DiT:\n    pass\n",
    "src/ldit/nn/late.py": "def load():\n    from ldit.nn.later import load\n\n    return load()\n",
    "src/ldit/nn/later.py": "from ldit.nn.late import load\n",
    "src/ldit/nn/typed.py": "if typing.TYPE_CHECKING:\n    from ldit.nn.types import T\n",
    "src/ldit/nn/types.py": "import ldit.nn.typed\n",
    "src/ldit/nn/upward.py": "from ldit.errors import LditError\nfrom ldit.diffusion import build\n",
    "src/ldit/diffusion/levels.py": '''"""Text."""

from ldit.nn.one import DiT


def check(value):
    """Text."""
    if not value:
        # why
        raise ValueError(
            value
        )
    if value > 1:
        value = 1  # (B, N)
    else:
        raise ValueError
    return value


def level(process):
    """Text."""
    # what

    assert isinstance(process, object)
    if process.y:
        raise ValueError
    else:
        return process.x  # type: ignore[attr-defined]
''',
    "src/ldit/sampling/ask.py": """
def ask(spec, process, config, names):
    a = getattr(spec.model, "num_classes", 0), hasattr(spec.model, "null_class")
    b = getattr(spec.model, "check", 0), getattr(spec.model, names, 0)
    c = isinstance(process, (Pixels, diffusion.Flow)), isinstance(process, Pixels)
    match config:
        case DDPMConfig():
            return a, b, c
""",
    "tests/rules/test_architecture.py": """
GROUND = {"errors"}
ALLOWED = {"config": set(), "nn": {"config"}, "diffusion": {"nn"}, "sampling": set()}
""",
}  # fmt: skip


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def metrics(tmp_path: Path) -> dict[str, Any]:
    write(tmp_path, PACKAGE)
    return {metric.name: metric for metric in house.static(tmp_path)}


def test_cycles_are_found_by_the_way_they_close(metrics: dict[str, Any]) -> None:
    hard, late, typed = (
        f"ldit.nn.{a} <-> ldit.nn.{b}" for a, b in [("one", "two"), ("late", "later"), ("typed", "types")]
    )
    assert metrics["import cycles at module level"].places == [hard]
    assert metrics["with deferred imports"].places == [late, hard]
    assert metrics["with those under TYPE_CHECKING"].places == [late, hard, typed]
    assert metrics["deferred imports"].value == metrics["imports under TYPE_CHECKING"].value == 1


def test_upward_imports_are_found(metrics: dict[str, Any], tmp_path: Path) -> None:
    assert metrics["upward imports"].places == ["nn/upward.py:2 ldit.diffusion.build"]
    (tmp_path / "tests" / "rules" / "test_architecture.py").unlink()
    assert house.upward(tmp_path, []).value == "n/a"


def test_questions_for_classes_and_fields_are_found(metrics: dict[str, Any]) -> None:
    """Those within diffusion/ are at home; names that are no field of a network's configuration do not count."""
    assert metrics["isinstance of a process"].places == ["sampling/ask.py:5", "sampling/ask.py:7"]
    assert metrics["getattr of a model's field"].places == [
        "sampling/ask.py:3 getattr(spec.model, 'num_classes', 0)",
        "sampling/ask.py:3 hasattr(spec.model, 'null_class')",
    ]
    assert metrics["assert isinstance"].value == metrics["type: ignore"].value == 1
    assert metrics["public names with two homes"].places == ["DiT: nn/one.py, nn/two.py"]


def test_lines_are_counted_by_what_they_hold(tmp_path: Path) -> None:
    write(tmp_path, PACKAGE)
    [module] = [m for m in house.load(tmp_path) if m.name == "ldit.diffusion.levels"]
    assert len(module.code) == 17
    # All of check but its docstring and comment, the assert, and a raise without its `if`, which has another way too.
    assert house.defensive(module) == {6, 8, *range(10, 18), 24, 26}
    own, behind = house.comments([module])
    assert (own.value, behind.value) == (house.percent(2, 16), house.percent(2, 16))


def test_rooms_are_measured(metrics: dict[str, Any]) -> None:
    lines = {name: text.count("\n") for name, text in PACKAGE.items() if name.startswith("src")}
    assert metrics["modules in the package"].value == len(lines)
    assert metrics["lines in the package"].value == sum(lines.values())
    largest = sum(count for name, count in lines.items() if "/diffusion/" in name)
    assert metrics["largest room, % of the lines"].value == house.percent(largest, sum(lines.values()))
    assert metrics["largest room, % of the lines"].places[1].split()[0] == str(largest)  # after the top level


RUN = {
    "src/distributed_c10d.py": "def all_gather():\n    pass\n\n\ndef barrier():\n    pass\n",
    "src/fsdp.py": "import distributed_c10d\n\n\ndef shard():\n    distributed_c10d.all_gather()\n",
    "src/ldit/__init__.py": "",
    "src/ldit/unused.py": "",
    "src/ldit/__main__.py": """
import fsdp
import distributed_c10d
from ldit.parallel import exchange, world
from ldit.training import step


def begin():
    world.run_on_all(lambda: None)
    world.from_rank0(lambda: None)
    world.run_on_all(lambda: world.from_rank0(lambda: None))
    world.launch(lambda: world.run_on_all(lambda: None))
    distributed_c10d.barrier()
    exchange.scatter_parts()
    fsdp.shard()


begin()
step.train_step()
world.run_on_all(lambda: None)
""",
    "src/ldit/parallel/exchange.py": """
import distributed_c10d


def scatter_parts():
    distributed_c10d.all_gather()
""",
    "src/ldit/parallel/world.py": """
import distributed_c10d


def gather():
    distributed_c10d.all_gather()
    distributed_c10d.all_gather()


def run_on_all(work):
    work()
    gather()


def from_rank0(work):
    run_on_all(work)
    gather()


def launch(work):
    work()


class World:
    size = 1
""",
    "src/ldit/training/step.py": "def train_step():\n    pass\n",
}


def test_a_run_is_followed_up_to_its_first_step(tmp_path: Path) -> None:
    """Two collectives in one call are one exchange; what is inside the work of another agreement is nested, but not
    what is inside of a function that agrees on nothing."""
    write(tmp_path, RUN)
    report = first_step.watched(tmp_path, 1, [])
    assert report["agreements"] == [f"__main__.py:{line}" for line in (9, 10, 11, 12, 13)]
    assert report["nested"] == ["__main__.py:11"]
    assert report["exchanges"] == 1 + 2 + 3 + 1 + 1
    assert report["files"] == ["__main__.py", "parallel/exchange.py", "parallel/world.py"]
    assert report["functions"] == len({"begin", "gather", "run_on_all", "from_rank0", "launch", "scatter_parts"})
    modules = ["parallel", "parallel.exchange", "parallel.world", "training", "training.step"]
    assert report["imported"] == [f"ldit.{name}" for name in modules]


def test_a_run_without_a_step_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"src/ldit/__init__.py": "", "src/ldit/__main__.py": "raise SystemExit('no such recipe')\n"})
    with pytest.raises(SystemExit, match="no such recipe"):
        first_step.watched(tmp_path, 1, ["train", "nothing"])
