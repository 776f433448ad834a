"""Where commands may write: nothing inside a folder that a manifest seals, and runs only where a run can live."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import make_folder, over

import ldit
from ldit.checkpoint.run import check_run_dir, step_folder
from ldit.cli.main import dispatch, main
from ldit.commands.train import run as train
from ldit.errors import LditError, RequestError, SourceError

SAMPLE = ("sample", "--ckpt", "RUN", "--class-labels", "0", "--steps", "1")
TRAIN = ("train", "tiny-cpu", "--train.steps", "1", "--out")
COMMANDS = {
    "train": (*TRAIN, "STEP"),
    "train-below": (*TRAIN, "STEP/state/run"),
    "ema": ("ema", "RUN", "STEP/zz", "--sigma-rel", "0.07"),
    "convert": ("convert", "RUN", "STEP/zz"),
    "launch": ("launch", "slurm", "tiny-cpu", "--file", "STEP/x.sbatch"),
    "grid": (*SAMPLE, "--image-save-path", "STEP/x.png"),
    "singles": (*SAMPLE, "--out", "STEP"),
    "latents": (*SAMPLE, "--latents-out", "STEP/x.pt"),
    "plot": ("plot", "RUN", "--out", "STEP/x.png"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a committed step and snapshots: every command above could do its work."""
    base = tmp_path_factory.mktemp("places")
    values = {"ema.power": (0.05, 0.1), "ema.snapshot_every": 1}
    assert train(over(make_folder(base / "data"), values), base / "run") == 0
    return base / "run"


LITE = ("--extractor", "efficientnet-lite0")
OUTSIDE = {
    "train": ("train", "tiny-cpu", "--data.path", "DATA", "--train.steps", "1", "--model.num_classes", "3", "--out"),
    "encode": ("encode", "DATA", "--image-size", "16", "--codec", "emoji64-vae", "--out"),
    "set": ("sample", "--ckpt", "RUN", "--num", "2", "--steps", "1", "--out"),
    "array": ("sample", "--ckpt", "RUN", "--num", "2", "--steps", "1", "--out", "NPZ"),
    "singles": (*SAMPLE, "--image-save-path", "FREE/x.png", "--out"),
    "grid": (*SAMPLE, "--image-save-path", "PNG"),
    "latents": (*SAMPLE, "--latents-out", "PT"),
    "report": ("evaluate", "RUN", "--reference", "FREE", "--num", "2", *LITE, "--json", "JSON"),
    "figure": ("evaluate", "FREE", "--reference", "DATA", *LITE, "--figure", "PNG"),
}


@pytest.mark.parametrize("command", OUTSIDE)
def test_nothing_is_written_among_the_images_that_are_read(run: Path, tmp_path: Path, command: str) -> None:
    """The folder itself, one in it, its parent, a class of it, the same by a link: each would be trained on next time,
    or hold a run that holds its own data."""
    data = run.parent / "data"
    link = tmp_path / "link"
    link.symlink_to(data)
    name = next(path.name for path in data.iterdir() if path.is_dir())
    places = [data / "new", data / name, data / name / "new" / "deep", link, link / "new"]
    if command in ("train", "encode"):
        places += [data, data.parent]
    before = tree(run.parent)
    for place in places:
        words = {
            "RUN": str(run), "DATA": str(data), "FREE": str(tmp_path), "NPZ": f"{place}.npz", "PNG": f"{place}.png",
            "PT": f"{place}.pt", "JSON": f"{place}.json",
        }  # fmt: skip
        arguments = [words.get(word, word.replace("FREE", str(tmp_path))) for word in OUTSIDE[command]]
        if arguments[-1] == "--out":
            arguments.append(str(place))
        elif place == link or not Path(arguments[-1]).parent.is_dir():  # a file beside the link is outside
            continue
        said = refusal(arguments)
        assert f"{data}, whose images are read" in said or f"{link}, whose images are read" in said, (place, said)
        assert tree(run.parent) == before


def test_the_home_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` in every path that is given, also where the shell leaves it: --out=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    (tmp_path / "data").symlink_to(run.parent / "data")
    work = tmp_path / "made"
    work.mkdir()
    for line in (
        "sample --ckpt=~/run --class-labels 0 --steps 1 --image-save-path=~/made/x.png --out=~/made/singles",
        "sample --ckpt ~/run --class-labels 0 --steps 1 --latents-out=~/made/x.safetensors",
        "sample --ckpt ~/run --num 2 --steps 1 --out=~/made/set.npz",
        "sample --ckpt ~/run --class-labels 0 --steps 2 --init-image ~/made/x.png --image-save-path ~/made/y.png",
        "convert ~/run ~/made/export",
        "ema ~/run ~/made/ema --sigma-rel 0.07",
        "plot ~/run --out=~/made/curves.png",
        "info ~/run",
        "launch slurm tiny-cpu --file=~/made/x.sbatch --out=~/made/run",
        "train tiny-cpu --data.path=~/data --train.steps=1 --model.num_classes=3 --train.init_from=~/made/export "
        "--out=~/made/run",
        "train ~/made/run --train.steps 2",
    ):
        main(line.split())
        assert not (tmp_path / "~").exists(), line
    names = {path.name for path in work.iterdir()}
    assert names == {
        "x.png", "singles", "x.safetensors", "set.npz", "set.npz.json", "y.png", "export", "ema", "curves.png",
        "x.sbatch", "run",
    }  # fmt: skip
    assert train(over(make_folder(tmp_path / "more"), {"data.path": "~/more"}), "~/made/again") == 0
    assert (work / "again" / "checkpoints").is_dir() and not (tmp_path / "~").exists()
    ldit.load("~/made/export")


def refusal(arguments: list[str]) -> str:
    """What a command says that must not be carried out."""
    with pytest.raises(LditError) as caught:
        dispatch(arguments[0], arguments[1:])
    return str(caught.value)


def tree(folder: Path) -> dict[Path, bytes | None]:
    """Every folder, and every file with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(arguments: list[str], kind: type[LditError], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with an error of this kind."""
    with pytest.raises(kind):
        main([*arguments, "--debug"])
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ldit: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("through", ["itself", "a-link"])
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_written_into_a_committed_step(
    name: str,
    through: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = step_folder(run, 2)
    (link := tmp_path / "link").symlink_to(step)
    place = step if through == "itself" else link
    arguments = [word.replace("STEP", str(place)).replace("RUN", str(run)) for word in COMMANDS[name]]
    monkeypatch.chdir(tmp_path)
    before = tree(run)
    assert f"{step.resolve()} is sealed by its manifest.json" in refused(arguments, RequestError, capsys)
    assert tree(run) == before and list(tmp_path.iterdir()) == [link]


def test_beside_a_step_commands_write(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run itself is not sealed: what is refused above is refused for the step's sake."""
    own = shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for name in COMMANDS.keys() - {"train", "train-below"}:
        (place := own / "beside" / name).mkdir(parents=True)
        assert main([word.replace("STEP", str(place)).replace("RUN", str(own)) for word in COMMANDS[name]]) == 0
        assert any(place.iterdir()), name


def foreign(run: Path, place: Path, text: str) -> None:
    place.mkdir()
    (place / "config.json").write_text(text)


def without(run: Path, place: Path, name: str) -> None:
    """The run with a file where it has this folder."""
    shutil.copytree(run, place)
    shutil.rmtree(place / name, ignore_errors=True)
    (place / name).write_text("mine")


WRONG: dict[str, tuple[Callable[[Path, Path], object], str, type[LditError]]] = {
    "file": (lambda run, place: place.write_text("mine"), "place is a file, not a run directory", SourceError),
    "export": (lambda run, place: main(["convert", str(run), str(place)]), "place is sealed by its", RequestError),
    "foreign": (lambda run, place: foreign(run, place, '{"model_type": "bert"}'), "is not that of a run", SourceError),
    "list": (lambda run, place: foreign(run, place, "[1]"), "is not that of a run", SourceError),
    "no-json": (lambda run, place: foreign(run, place, "{"), "place/config.json", SourceError),
    "samples": (lambda run, place: without(run, place, "samples"), "place/samples is a file", SourceError),
    "checkpoints": (lambda run, place: without(run, place, "checkpoints"), "place/checkpoints is a file", SourceError),
    "snapshots": (lambda run, place: without(run, place, "snapshots"), "place/snapshots is a file", SourceError),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_place_where_no_run_can_live_is_one_line(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And stays as it is, to the byte."""
    make, said, kind = WRONG[name]
    make(run, tmp_path / "place")
    capsys.readouterr()
    before = tree(tmp_path)
    assert said in refused([*TRAIN, str(tmp_path / "place")], kind, capsys)
    assert tree(tmp_path) == before


def test_places_where_a_run_can_live(run: Path, tmp_path: Path) -> None:
    """A run, one that has no step yet, an empty folder, one with files of its owner, and none yet: left as they are."""
    (tmp_path / "empty").mkdir()
    (notes := tmp_path / "notes").mkdir()
    (notes / "README").write_text("mine")
    (begun := tmp_path / "begun").mkdir()
    shutil.copy(run / "config.json", begun)
    for place in (run, tmp_path / "empty", notes, begun, tmp_path / "missing" / "below"):
        before = (tree(run), tree(tmp_path))
        check_run_dir(place)
        assert (tree(run), tree(tmp_path)) == before


def test_a_run_goes_on_and_begins_in_an_empty_folder(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    (empty := tmp_path / "empty").mkdir()
    values = {"ema.power": (0.05, 0.1), "ema.snapshot_every": 1, "train.steps": 3}
    for place in (again, empty):
        assert train(over(run.parent / "data", values), place) == 0
        assert step_folder(place, 3).is_dir()
