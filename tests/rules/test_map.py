"""The tree in docs/architecture.md is the one that tools/map.py prints."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
house_map = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "map.py")))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_document_holds_the_tree() -> None:
    """After a module is added, moved or described anew: `python tools/map.py --write`."""
    [block] = house_map.BLOCK.findall(house_map.DOCUMENT.read_text())
    assert block.splitlines() == house_map.tree(ROOT / "src" / "ldit").splitlines()


def test_lines_fit() -> None:
    assert max(map(len, house_map.tree(ROOT / "src" / "ldit").splitlines())) <= 150


def test_files_come_before_folders_and_rooms_from_the_bottom_up(tmp_path: Path) -> None:
    for name in ("training/tasks/task.py", "training/step.py", "nn/dit.py", "errors.py"):
        write(tmp_path / name, '"""Text."""\n')
    write(tmp_path / "training" / "__init__.py", "")
    write(tmp_path / "flows" / "__pycache__" / "gone.pyc", "")
    assert [name for name, _ in house_map.rows(tmp_path)] == [
        "  errors.py",
        "  nn/",
        "    dit.py",
        "  training/",
        "    step.py",
        "    tasks/",
        "      task.py",
    ]


@pytest.mark.parametrize(
    ("docstring", "caption"),
    [
        ("One sentence.", "One sentence"),
        ("One sentence. Another one.", "One sentence"),
        (
            "Reads config.json, e.g.\nDiT's (Karras et al. 2024). More.",
            "Reads config.json, e.g. DiT's (Karras et al. 2024)",
        ),
        ("No dot\n\nAnother paragraph.", "No dot"),
        ("four " * 21 + "seventeen", "four " * 21 + "…"),
    ],
)
def test_a_caption_is_the_first_sentence(docstring: str, caption: str, tmp_path: Path) -> None:
    write(tmp_path / "one.py", f'"""{docstring}"""\n')
    assert house_map.caption(tmp_path / "one.py") == caption
    assert len(caption) <= house_map.LONGEST


def test_what_has_no_caption_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "new_room" / "one.py", '"""Text."""\n')
    with pytest.raises(SystemExit, match="new_room: no caption in FOLDERS"):
        house_map.tree(tmp_path)
    write(tmp_path / "one.py", "x = 1\n")
    with pytest.raises(SystemExit, match=r"one\.py: no docstring"):
        house_map.tree(tmp_path)
