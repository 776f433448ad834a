"""The tools that test the tests: what becomes of a mutant, that every mutant still applies, when a soak row passes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOUND = "def answer():\n    return 1\n"


def tool(name: str) -> ModuleType:
    """A script of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutations, soak = tool("mutations"), tool("soak")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one module, its test, and a folder without tests."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half a second each
    for name, text in {
        "src/ldit/__init__.py": "",
        "src/ldit/one.py": SOUND,
        "tests/test_one.py": "from ldit.one import answer\n\n\ndef test_answer():\n    assert answer() == 1\n",
        "none/notes.txt": "",
    }.items():
        (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("new", "tests", "fate"),
    [
        ("return 2 - 1", "tests", "SURVIVED"),
        ("return 2", "tests", "killed"),
        ("return (", "tests", "BROKEN"),  # cannot be collected: pytest ends with 2
        ("return 2", "none", "BROKEN"),  # no tests: 5
        ("return 2", "nowhere", "BROKEN"),  # no such folder: 4
    ],
)
def test_the_fate_of_a_mutant(new: str, tests: str, fate: str, tree: Path) -> None:
    """Only a test that fails kills it; and the copy is sound again for the next one."""
    assert mutations.fate(mutations.Mutant("one.py", "return 1", new, tests), tree) == fate
    assert (tree / "src" / "ldit" / "one.py").read_text() == SOUND


def test_a_mutant_that_does_not_apply_ends_the_run(tree: Path) -> None:
    with pytest.raises(SystemExit, match=r"one\.py: 'return 3' is not there any more"):
        mutations.fate(mutations.Mutant("one.py", "return 3", "return 4", "tests"), tree)


def test_every_mutant_still_applies() -> None:
    """To the code as it is, with tests that exist; else it would be found out after hours."""
    for mutant in mutations.MUTANTS:
        assert mutant.old in (ROOT / "src" / "ldit" / mutant.file).read_text() and mutant.new != mutant.old, mutant
        assert all((ROOT / name).exists() for name in mutant.tests.split()), mutant


@pytest.mark.parametrize(
    ("attributes", "expected", "sound"),
    [
        ('tests="3" failures="0" errors="0" skipped="0"', (3, 0, 0), True),
        ('tests="3" failures="0" errors="0" skipped="1"', (2, 0, 1), False),
        ('tests="3" failures="1" errors="0" skipped="0"', (2, 1, 0), False),
        ('tests="3" failures="0" errors="1" skipped="0"', (2, 1, 0), False),
        ('tests="0" failures="0" errors="0" skipped="0"', (0, 0, 0), False),
        (None, (0, 1, 0), False),
    ],
)
def test_a_row_of_the_soak_passes_only_whole(
    attributes: str | None, expected: tuple[int, int, int], sound: bool, tmp_path: Path
) -> None:
    """A test that was skipped has shown nothing; no more has a run that left no report."""
    report = tmp_path / "report.xml"
    if attributes is not None:
        report.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")
    result = soak.count(report)
    assert (tuple(result), result.sound) == (expected, sound)
