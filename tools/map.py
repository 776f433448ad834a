"""Prints the tree of docs/architecture.md: every module with the first sentence of its docstring.

    python tools/map.py [--write]

`--write` puts it between the markers `<!-- map -->` and `<!-- /map -->` of that file. Empty files are left out.
"""

import argparse
import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(?<=<!-- map -->\n).*(?=<!-- /map -->)", re.DOTALL)
COLUMN, LONGEST = 32, 110  # where captions begin, and how long they may be
END_OF_SENTENCE = re.compile(r"(?<!et al)(?<!e\.g)(?<!i\.e)\.(\s+(?![a-z])|$)")

# What each folder is for, from the bottom of the house to the top: the order of the tree.
FOLDERS = {
    "config": "what is asked for; torch-free, so that --help is instant",
    "config/requests": "one dataclass a command: its fields are the flags and the Python keywords",
    "config/recipes": "functions that return a whole run, by name or from a user's own file",
    "storage": "files that are whole or not there; knows no model",
    "nn": "networks; torch only",
    "diffusion": "processes: losses, noise schedules, posteriors; pure tensors",
    "sampling": "levels, guidance and solvers; pure tensors",
    "sampling/fast": "the inference copy of a network: same outputs, less time or memory",
    "codecs": "images <-> latents; labels or prompts -> conditioning",
    "data": "samples, their order, and the loader",
    "data/formats": "kinds of data sets, each a row in the table that source.py reads",
    "data/images": "image files -> RGB tensors",
    "data/latent_cache": "latents that are encoded once and read at every epoch",
    "parallel": "the processes of a run, and which part of a model each holds",
    "checkpoint": "runs and models on disk",
    "checkpoint/layouts": "layouts of other projects, read and written",
    "pipeline": "the public way from a model to images",
    "pipeline/sets": "many images of one model, in a folder, an array or a stream",
    "training": "the training step, its state, and the loop around it",
    "training/tasks": "what is trained: network, inputs and losses",
    "eval": "how good images are",
    "eval/metrics": "features -> FID, KID, precision and recall, Inception Score",
    "eval/extractors": "networks that turn images into features",
    "bench": "speed and memory against the measured ceiling of the machine",
    "flows": "what a command does, where several rooms meet",
    "commands": "what a command does where several rooms meet, one file each",
    "cli": "the command line: parse, call one function, print",
    "cli/original": "the flags of the original's train.py and sample.py",
    "web": "the web page",
    "assets": "emoji64, bundled models, ImageNet class names",
}


def caption(path: Path) -> str:
    """The first sentence of a module's docstring, cut between words."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    if not text:
        raise SystemExit(f"{path}: no docstring")
    paragraph = " ".join(text.split("\n\n")[0].split())
    return textwrap.shorten(END_OF_SENTENCE.split(paragraph)[0], LONGEST, placeholder=" …")


def holds(folder: Path, pattern: str) -> bool:
    """Whether a folder has such files; compiled ones are left behind where a folder was moved."""
    return any(path.is_file() and path.suffix != ".pyc" for path in folder.rglob(pattern))


def rows(package: Path, folder: str = "") -> Iterator[tuple[str, str]]:
    """(indented name, caption) of everything in a folder: files in order of name, then folders in order of FOLDERS."""
    here = package / folder
    indent = "  " * (1 + len(Path(folder).parts))
    for path in sorted(here.glob("*.py")):
        if path.stat().st_size:
            yield indent + path.name, caption(path)
    below = [path.relative_to(package).as_posix() for path in here.iterdir() if holds(path, "*")]
    for name in below:
        if name not in FOLDERS and holds(package / name, "*.py"):
            raise SystemExit(f"{package / name}: no caption in FOLDERS")
    for name in (name for name in FOLDERS if name in below):
        yield f"{indent}{Path(name).name}/", FOLDERS[name]
        yield from rows(package, name)


def tree(package: Path) -> str:
    lines = [f"{name:{COLUMN - 1}} {text}" for name, text in rows(package)]
    return "\n".join(["```", "src/ldit/", *lines, "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.relative_to(ROOT)}")
    text = tree(ROOT / "src" / "ldit")
    if not parser.parse_args().write:
        print(text, end="")
        return
    written, blocks = BLOCK.subn(lambda _: text, DOCUMENT.read_text())
    if blocks != 1:
        raise SystemExit(f"{DOCUMENT}: no block between <!-- map --> and <!-- /map -->")
    DOCUMENT.write_text(written)


if __name__ == "__main__":
    main()
