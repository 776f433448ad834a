"""The recipe of `ldit train` is the first argument and nothing else, whatever the values of flags are called; and the
notice of `ldit launch`."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ldit.cli.main import main
from ldit.cli.train import parse_arguments
from ldit.config.recipes.registry import RECIPES, recipe
from ldit.errors import ConfigError

INIT = ("--train.init-from", "emoji64-class-xs")


def test_a_bundled_model_to_start_from_is_no_recipe() -> None:
    """It has the name of one."""
    assert "emoji64-class-xs" in RECIPES
    for flags in (("--out", "run", *INIT), (*INIT, "--out", "run")):
        parsed = parse_arguments(["tiny-cpu", *flags])
        tiny = recipe("tiny-cpu")
        assert parsed.config == replace(tiny, train=replace(tiny.train, init_from="emoji64-class-xs"))
        assert parsed.out == Path("run")


def test_a_folder_may_have_the_name_of_a_recipe() -> None:
    for name in ("tiny-cpu", "emoji64-class-xs"):
        parsed = parse_arguments(["tiny-cpu", "--out", name, "--data.path", name])
        assert (parsed.out, parsed.config.data.path) == (Path(name), name)
        assert parsed.config.model == recipe("tiny-cpu").model


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tinycpu", *INIT], "unknown recipe 'tinycpu' (known: "),
        (["--out", "tiny-cpu", "emoji64-class-xs"], "needs a recipe first (recipes: "),
        (["--out", "run", "tiny-cpu"], "needs a recipe first"),
        ([*INIT, "--out", "run"], "needs a recipe first"),
        ([], "needs a recipe first"),
        (["tiny-cpu", "emoji64-class-xs", "--out", "run"], "emoji64-class-xs"),
    ],
)
def test_another_recipe_is_not_guessed(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and nothing begins."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        main(["train", *arguments, "--debug"])
    assert main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ldit: ") and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == []


def test_the_notice_stands_in_the_script(tmp_path: Path) -> None:
    """As Slurm's signal, and where the script says what it is."""
    file = tmp_path / "job.sbatch"
    assert main(["launch", "slurm", "tiny-cpu", "--notice", "1234", "--file", str(file)]) == 0
    text = file.read_text()
    assert re.findall(r"^#SBATCH --signal=(.*)$", text, re.MULTILINE) == ["USR1@1234"]
    assert "# 1234 s before the time limit" in text and "180" not in text


@pytest.mark.parametrize("notice", ["0", "-5"])
def test_a_notice_below_a_second_is_refused(notice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.sbatch"
    assert main(["launch", "slurm", "tiny-cpu", "--notice", notice, "--file", str(file)]) == 2
    assert capsys.readouterr().err == f"ldit: --notice: must be at least 1, got {notice}\n"
    assert not file.exists()
