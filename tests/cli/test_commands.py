"""The table of commands; flags against help; the nearest name of a word that is unknown."""

import importlib
import json
import subprocess
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from ldit.cli.arguments import parse
from ldit.cli.commands import GROUPS, TABLE
from ldit.cli.help import docstrings, help_text, rows
from ldit.cli.main import main
from ldit.config.recipes.registry import EXPERIENCE, RECIPES
from ldit.config.requests.fields import HEADINGS
from ldit.config.requests.sampling import SampleRequest

REQUESTS = [row for row in TABLE if row.request]


def imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_row_of_the_table_exists(row: Any) -> None:
    assert callable(imported(row.function)) and row.group in GROUPS
    assert not row.request or is_dataclass(imported(row.request))
    assert len(row.line) <= 70


@pytest.mark.parametrize("row", REQUESTS, ids=lambda row: row.name)
def test_help_lists_every_field_with_a_text(row: Any) -> None:
    kind = imported(row.request)
    text = help_text(kind, f"ldit {row.name}", row.text)
    assert docstrings(kind).keys() >= {entry.name for entry in fields(kind)}
    for entry in fields(kind):
        names = [f"--{name}".replace("_", "-") for name in (entry.name, *entry.metadata.get("aliases", ()))]
        names.append(entry.metadata.get("metavar", entry.name.upper()))
        assert any(name in text for name in names), entry.name
    assert "None" not in text and "default: )" not in text


@pytest.mark.parametrize("row", REQUESTS, ids=lambda row: row.name)
def test_every_flag_of_help_is_taken(row: Any) -> None:
    """Help and the reader of flags go by the same fields: the values of help's defaults are what no flag gives."""
    kind = imported(row.request)
    needed: list[str] = []
    for entry in rows(kind):
        if entry.is_first:
            needed += ["place"] * entry.required
        elif entry.required:
            needed += [entry.flags[0], "1"]
    made = parse(kind, needed, row.name)
    for entry in fields(kind):
        if entry.default is not MISSING:
            assert getattr(made, entry.name) == entry.default, entry.name
    for entry in rows(kind):
        for flag in entry.flags:
            value = [] if not entry.metavar else [entry.metavar.strip("{[").split(",")[0].split("|")[0].split(" ")[0]]
            words = {"N": "1", "X": "0.5", "TEXT": "a", "PATH": "a", "true": "true"}
            given = [words.get(word, word.strip("}")) for word in value] * max(1, len(entry.metavar.split(" ")))
            if "…" in entry.metavar or "|" in entry.metavar:
                given = given[:1]
            if not entry.is_first and not entry.required and entry.flags:
                parse(kind, [*needed, flag, *given], row.name)


def test_headings_of_sample() -> None:
    groups = list(dict.fromkeys(row.group.split(" ")[0] for row in rows(SampleRequest)))
    assert set(groups) == {"What", "Sampler", "Guidance", "Size", "Set", "Machine", "Files", "Checkpoint"}
    text = help_text(SampleRequest, "ldit sample")
    places = [text.index(f"\n{group}") for group in (*[h for h in HEADINGS if h in groups], "Machine")]
    assert places == sorted(places)


def test_the_source_may_stand_first() -> None:
    for arguments in (["model", "--steps", "3"], ["--ckpt", "model", "--steps", "3"], ["--steps", "3", "--ckpt=model"]):
        request = parse(SampleRequest, arguments, "ldit sample")
        assert (request.source, request.steps) == ("model", 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sampel"], "unknown command 'sampel' (did you mean sample?)"),
        (["sample", "x", "--stepz", "3"], "unknown flag --stepz (did you mean --steps?)"),
        (["sample", "x", "--cfg_scal=3"], "unknown flag --cfg_scal (did you mean --cfg-scale?)"),
        (
            ["train", "tiny-cpu", "--out", "x", "--train.lrr", "1"],
            "unknown flag --train.lrr (did you mean --train.lr?)",
        ),
        (["bench", "trian"], "needs a subcommand: train or sample, not 'trian' (did you mean train?)"),
        (["data", "chek"], "(did you mean check?)"),
    ],
)
def test_the_nearest_name_is_told(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0 and set(EXPERIENCE) == set(RECIPES)
    lines = capsys.readouterr().out.splitlines()
    rows = lines[1 : lines.index("")]
    assert [line.split()[0] for line in rows] == list(RECIPES) and all(len(line.split()) > 3 for line in rows)


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It names what is missing with the command that fixes it, and changes nothing."""
    for name in ("HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("LDIT_INCEPTION_WEIGHTS", raising=False)
    assert main(["doctor", "--json"]) == 0
    report = {(one["section"], one["name"]): one for one in json.loads(capsys.readouterr().out)}
    assert report["versions", "torch"]["value"] and not report["versions", "torch"]["fix"]
    lack = report["places", "Inception weights (FID)"]
    assert lack["value"] == "not found" and lack["fix"].startswith(f"wget -P {tmp_path}")
    assert "emoji64-class-xs" in report["places", "bundled models"]["value"] and not list(tmp_path.iterdir())
    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setenv("LDIT_INCEPTION_WEIGHTS", str(weights))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert str(weights) in text and "wget" not in text and "capabilities" in text


COMPLETE = """source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _tyro_ldit; printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_the_shell_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands, subcommands, recipes and flags, by the script that bash would source."""
    assert main(["--tyro-print-completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def offered(*words: str) -> list[str]:
        command = ["bash", "-c", COMPLETE, "bash", str(tmp_path / "script"), "ldit", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert offered("sam") == ["sample"]
    assert {"train", "sample"} <= set(offered("bench", ""))
    assert set(RECIPES) <= set(offered("train", ""))
    assert set(offered("train", "tiny-cpu", "--train.l")) == {"--train.lr", "--train.log-every"}
    assert "--guidance" in offered("sample", "--gui") and "--reference" in offered("evaluate", "--ref")
