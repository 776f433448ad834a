"""What the documents promise exists."""

import re
import shlex
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from ldit.cli import main as cli
from ldit.cli.commands import NAMES
from ldit.cli.original import sample as original_sample
from ldit.cli.original import train as original_train

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


PROGRAM = re.compile(
    r"(?:torchrun(?P<launcher>.*) -m (?:-- )?)?(?:ldit (?P<name>[a-z]+)|python (?:-u )?(?P<script>\w+\.py))(?P<rest>.*)"
)
SCRIPTS = {"train.py": original_train.run, "sample.py": original_sample.run}


def asked(text: str) -> dict[str, set[str]]:
    """Program -> the flags a document gives it: on lines and in code spans that begin with it, after the -- of
    `ldit launch`, and in the first column of tables of flags, which are those of training; "" -> flags alone in a
    code span."""
    found: dict[str, set[str]] = defaultdict(set)
    lines = [re.sub(r"\s#.*", "", line) for line in text.splitlines()]
    lines += [f"ldit train {given}" for given in re.findall(r"^\| `(--[^`]*)` \|", text, re.MULTILINE)]
    lines += (spans := re.findall(r"`([^`\n]+)`", text))
    for match in filter(None, map(PROGRAM.match, lines)):
        own, _, others = match["rest"].partition(" -- ")
        found[match["name"] or match["script"]] |= flags(own)
        found["train"] |= flags(others)
        found["torchrun"] |= flags(match["launcher"] or "")
    for span in spans:
        found[""] |= flags(span) if span.startswith("--") else set()
    return found


def flags(text: str) -> set[str]:
    """Hyphens and underscores are the same."""
    return {flag.replace("_", "-").rstrip(".") for flag in re.findall(r"--[a-z][\w.-]*", text)}


def help_of(program: str, capsys: pytest.CaptureFixture[str]) -> str:
    if program == "torchrun":
        return get_args_parser().format_help()
    words = [program, "slurm"] if program == "launch" else [program]
    with suppress(SystemExit):
        SCRIPTS[program](["--help"]) if program in SCRIPTS else cli.main([*words, "--help"])
    return capsys.readouterr().out


def test_every_flag_of_the_readme_exists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README gives a program is in that program's help."""
    monkeypatch.setenv("COLUMNS", "200")
    found = asked((ROOT / "README.md").read_text())
    alone = found.pop("")
    assert found.keys() >= {"train", "sample", "plot", "ema", "launch", "bench", "info", "convert", "sample.py"}
    known = {program: flags(help_of(program, capsys)) for program in {*found, *SCRIPTS, "torchrun"}}
    assert {program: lost for program, given in found.items() if (lost := given - known[program])} == {}
    assert alone - set().union(*known.values()) == set()


def test_flags_are_found_wherever_they_stand() -> None:
    """By the reader above, in a README of its own."""
    text = """
ldit train a --out b --lost.a 1   # --not-this
torchrun --nproc-per-node 8 -m -- ldit train a --lost.b 4
ldit launch slurm a --lost-c 2 -- --lost.d 3
python -u sample.py --ckpt DIR --lost_e z [--lost-f FILE]
| `--lost.g 2 --lost.h` | text |
inline `ldit sample --lost-i` and `python train.py --lost-j`; `--lost-k`, in `ldit COMMAND --help`
"""
    assert asked(text) == {
        "train": {"--out", "--lost.a", "--lost.b", "--lost.d", "--lost.g", "--lost.h"},
        "torchrun": {"--nproc-per-node"},
        "launch": {"--lost-c"},
        "sample.py": {"--ckpt", "--lost-e", "--lost-f"},
        "sample": {"--lost-i"},
        "train.py": {"--lost-j"},
        "": {"--lost.g", "--lost.h", "--lost-k"},
    }


def launches(text: str) -> list[list[str]]:
    """What the commands in a document or script give torchrun: on lines and in code spans that begin with it."""
    text = text.replace("\\\n", " ")
    lines = [*text.splitlines(), *re.findall(r"`([^`\n]+)`", text)]
    commands = [re.sub(r"\s#.*", "", line).strip() for line in lines]
    return [shlex.split(command)[1:] for command in commands if command.startswith("torchrun -")]


def launched(words: list[str]) -> list[str]:
    """The script or module and its arguments, as torchrun's own reader finds them; SystemExit for what it refuses.

    Python 3.11's argparse looks for shortened options behind the script's name too, and refuses --num, which two of
    torchrun's begin with. After -m -- it does not: commands of `ldit` have that always."""
    read = get_args_parser().parse_args(words)
    if read.module and words[words.index(read.training_script) - 1] != "--":
        raise SystemExit(f"torchrun {' '.join(words)}: write -m -- {read.training_script}")
    return [read.training_script, *read.training_script_args]


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted((ROOT / "exps").glob("*.sh"))], ids=lambda p: p.name)
def test_torchrun_takes_every_command(path: Path) -> None:
    commands = [launched(words) for words in launches(path.read_text())]
    assert len(commands) >= {"README.md": 2, "evaluation.md": 3}.get(path.name, path.suffix == ".sh")
    for program, command, *_ in commands:
        assert command in NAMES if program == "ldit" else program.endswith("/train.py"), (program, command)


def test_commands_that_torchrun_takes_for_its_own_are_found() -> None:
    """In all forms in which documents may write them."""
    text = """
torchrun --nproc-per-node 2 -m ldit sample --ckpt X --num 20   # a comment
    torchrun --nproc-per-node 2 -m ldit sample --ckpt X \\
        --num "$num"
inline `torchrun --nproc-per-node 2 -m ldit train a`, and torchrun -m ldit in a text
torchrun --nproc-per-nodes 2 -m -- ldit sample
torchrun --nproc-per-node 2 -m -- ldit sample --ckpt X --num 20 …   # right
"""
    *wrong, right = sorted(launches(text), key=lambda words: words[-1] == "…")
    assert [words[-1] for words in wrong] == ["20", "$num", "sample", "a"]
    for words in wrong:
        with pytest.raises(SystemExit):
            launched(words)
    assert launched(right) == ["ldit", "sample", "--ckpt", "X", "--num", "20", "…"]
