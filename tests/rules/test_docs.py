"""What the documents promise exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_files_exist(path: Path) -> None:
    text = path.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
    for name in re.findall(r"`((?:docs|tests|benchmarks|tools|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_map_names_every_file() -> None:
    """docs/architecture.md has a caption for each module of the package."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = [p for p in (ROOT / "src" / "ldit").rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
    assert [p.name for p in modules if p.parent.name != "cli" and p.name not in text] == []


def test_every_flag_of_the_readme_exists() -> None:
    """Each `ldit COMMAND …` line parses: its flags are in the command's help."""
    lines = re.findall(r"^ldit (\w+) (.*?)(?:\s+#.*)?$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 6
    for command in {command for command, _ in lines}:
        words = [command, "slurm"] if command == "launch" else [command]
        code = f"from ldit.cli.main import main; main([*{words!r}, '--help'])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        flags = re.findall(r"--[\w.-]+", " ".join(rest.split(" -- ")[0] for name, rest in lines if name == command))
        assert [flag for flag in flags if flag not in done.stdout.replace("/--no-", " --no-")] == [], command
