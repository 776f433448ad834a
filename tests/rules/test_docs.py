"""What the documents promise exists."""

import re
import shlex
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from ldit import readable
from ldit.checkpoint.export import read_spec
from ldit.cli import main as cli
from ldit.cli.commands import NAMES, TABLE
from ldit.cli.original import sample as original_sample
from ldit.cli.original import train as original_train
from ldit.config.assets import ASSETS
from ldit.config.recipes.registry import diffusion_recipe
from ldit.nn.build import parameter_count
from ldit.sampling import grids
from ldit.sampling.solvers import ADAPTIVE, SOLVERS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
GUIDES = [path for path in DOCUMENTS if path.name != "LOG.md"]
"""What a user follows; the log keeps the commands of its days."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_files_exist(path: Path) -> None:
    text = path.read_text()
    assert "@@" not in text
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("http") or (path.parent / target).exists(), target
    for name in re.findall(r"`((?:docs|tests|benchmarks|tools|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_blocks_are_python(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
        compile(block, path.name, "exec")


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


PROGRAM = re.compile(
    r"(?:torchrun(?P<launcher>.*) -m (?:-- )?)?"
    r"(?:ldit (?P<name>[a-z]+)(?P<theme> (?:train|sample|check|slurm)\b)?|python (?:-u )?(?P<script>\w+\.py))"
    r"(?P<rest>.*)"
)
SCRIPTS = {"train.py": original_train.run, "sample.py": original_sample.run}
OTHER_KINDS = ("emoji64-latent-s", "emoji64-vae", "extractor-small")
"""Recipes whose sections have flags that those of `ldit train --help` have not."""


def lines_of(text: str) -> list[str]:
    """Without comments; a line that goes on in the next is one."""
    return [re.sub(r"\s#.*", "", line) for line in re.sub(r"\\\n\s*", "", text).splitlines()]


def asked(text: str, table: str = "train") -> dict[str, set[str]]:
    """Program -> the flags a document gives it: on lines and in code spans that begin with it, after the -- of
    `ldit launch`, and in the first column of tables of flags, which are those of the command `table`; "" -> flags alone
    in a code span."""
    found: dict[str, set[str]] = defaultdict(set)
    lines = lines_of(text)
    lines += [f"ldit {table} {given}" for given in re.findall(r"^\| `(--[^`]*)` \|", text, re.MULTILINE)]
    lines += (spans := re.findall(r"`([^`\n]+)`", text))
    for match in filter(None, map(PROGRAM.match, lines)):
        own, _, others = match["rest"].partition(" -- ")
        themed = match["name"] in THEMED
        name = f"{match['name']}{match['theme'] or ''}" if themed else match["name"]
        found[name or match["script"]] |= flags(own)
        if others:
            found["train"] |= flags(others)
        if match["launcher"]:
            found["torchrun"] |= flags(match["launcher"])
    for span in spans:
        found[""] |= flags(span) if span.startswith("--") else set()
    return found


THEMED = {row.name.split()[0] for row in TABLE if " " in row.name}


def flags(text: str) -> set[str]:
    """Hyphens and underscores are the same."""
    return {flag.replace("_", "-").rstrip(".") for flag in re.findall(r"--[a-z][\w.-]*", text)}


def helps(capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    """The flags of every program, from its help."""

    def printed(function: Callable[[list[str]], object], *words: str) -> set[str]:
        with suppress(SystemExit):
            function([*words, "--help"])
        return flags(capsys.readouterr().out)

    known = {row.name: printed(cli.main, *row.name.split()) for row in TABLE}
    known |= {name: printed(function) for name, function in SCRIPTS.items()}
    for recipe in OTHER_KINDS:
        known["train"] |= printed(cli.main, "train", recipe)
    return {**known, "torchrun": flags(get_args_parser().format_help())}


def test_every_flag_of_the_documents_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What README and docs give a program is in that program's help."""
    monkeypatch.setenv("COLUMNS", "200")
    known = helps(capsys)
    general = {"--help", "--debug", "--section.key"}
    everywhere: set[str] = set()
    for path in GUIDES:
        found = asked(path.read_text(), {"sample.md": "sample"}.get(path.name, "train"))
        alone = found.pop("", set())
        lost = {name: left for name, given in found.items() if (left := given - known.get(name, set()) - general)}
        assert lost == {}, path.name
        assert alone - set().union(*known.values()) - general == set(), path.name
        everywhere |= found.keys()
    assert everywhere >= {row.name for row in TABLE} | {"sample.py", "torchrun"}


def commands(text: str) -> list[list[str]]:
    """The `ldit` commands of a document's blocks of code, torchrun's among them; not those with words left out."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    found = [match for line in lines_of(blocks) if "…" not in line and "COMMAND" not in line
             if (match := re.match(r"(?:torchrun .* )?ldit (.*)", line))]  # fmt: skip
    return [shlex.split(match[1]) for match in found]


def test_every_command_of_the_documents_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, their values and positional arguments; nothing is run."""
    taken = []

    def imported(place: str) -> Any:
        if place.startswith("ldit.commands."):
            return lambda request: taken.append(place) or 0
        return actual(place)

    actual = cli._imported
    monkeypatch.setattr(cli, "_imported", imported)
    monkeypatch.setattr("ldit.commands.launch.run_slurm", lambda *given: 0)
    monkeypatch.setattr("ldit.commands.train.run", lambda *given: 0)
    monkeypatch.setattr("ldit.log.setup", lambda **settings: None)
    count = 0
    for path in GUIDES:
        for words in commands(path.read_text()):
            # Runs, files and models that are not here: a recipe stands in, whose sections have the same flags.
            name = words[1] if len(words) > 1 else ""
            if words[0] == "train" and (name.endswith(".pt") or name.isupper() or name == "ORG/NAME"):
                words = ["train", "dit-s-2", *words[2:]]
            elif words[0] == "train" and ("/" in name or ".py:" in name):
                words = ["train", "extractor-small" if "trainable" in name else "tiny-cpu", "--out", "x", *words[2:]]
            if words[0].startswith("-"):
                continue
            assert cli.main(words) == 0, (path.name, words)
            count += 1
    assert count > 40 and len(set(taken)) > 8


def test_flags_are_found_wherever_they_stand() -> None:
    """By the reader above, in a README of its own."""
    text = """
ldit train a --out b --lost.a 1   # --not-this
torchrun --nproc-per-node 8 -m -- ldit train a --lost.b 4
ldit launch slurm a --lost-c 2 -- --lost.d 3
ldit bench train --lost-m; ldit data
python -u sample.py --ckpt DIR --lost_e z [--lost-f FILE] \\
    --lost-l
| `--lost.g 2 --lost.h` | text |
inline `ldit sample --lost-i` and `python train.py --lost-j`; `--lost-k`, in `ldit COMMAND --help`
"""
    assert asked(text) == {
        "train": {"--out", "--lost.a", "--lost.b", "--lost.d", "--lost.g", "--lost.h"},
        "torchrun": {"--nproc-per-node"},
        "launch slurm": {"--lost-c"},
        "bench train": {"--lost-m"},
        "sample.py": {"--ckpt", "--lost-e", "--lost-f", "--lost-l"},
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


LAUNCHES = {"README.md": 1, "train.md": 1, "sample.md": 1, "data.md": 1, "extend.md": 1, "evaluate.md": 3}
"""Document -> commands of torchrun that it has at least."""


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted((ROOT / "exps").glob("*.sh"))], ids=lambda p: p.name)
def test_torchrun_takes_every_command(path: Path) -> None:
    commands = [launched(words) for words in launches(path.read_text())]
    assert len(commands) >= LAUNCHES.get(path.name, path.suffix == ".sh")
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


def test_figures_in_the_documents_are_the_codes() -> None:
    """Numbers and defaults that a reader meets first, against what the code has."""
    readme, card = (ROOT / "README.md").read_text(), (ROOT / "docs" / "emoji64-class-xs.md").read_text()
    solvers = [*(name for name in SOLVERS if name != "dpm++"), ADAPTIVE]  # dpm++ is another name of dpm++2m
    kinds = re.findall(r"^\| (\S+) +\| ", grids.__doc__ or "", re.MULTILINE)[1:]
    assert f"{len(solvers)} solvers, {len(kinds)} kinds of grids" in readme
    # The bundled model's own defaults, as its card has them.
    bundled = diffusion_recipe("emoji64-class-xs")
    sampling = read_spec(ASSETS / "models" / "emoji64-class-xs").sampling
    assert sampling == bundled.sampling and sampling is not None
    assert (sampling.solver, sampling.grid, sampling.steps) == ("ab4", "karras", 20)
    assert "AB-4 on the Karras grid, 20 steps" in card
    assert f"guidance {sampling.guidance:g} on all channels above noise time {sampling.guidance_interval[0]:g}" in card
    train = bundled.train
    assert f"{train.steps:,} steps of {train.batch_size}" in card
    count = parameter_count(bundled.model)
    assert f"{count:,} parameters" in card and readable.count(count) == "7.9M"
