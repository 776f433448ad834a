"""`ldit evaluate` and `ldit stats` as commands, and the script of the original's table."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from eval.evaluation import Stub, folder, noise
from pipeline.sets import exported
from torch.distributed.run import get_args_parser

from ldit.cli.arguments import parse
from ldit.cli.main import main
from ldit.cli.train import parse_arguments
from ldit.config.requests.evaluate import EvaluateRequest
from ldit.config.requests.sampling import SampleRequest
from ldit.config.run import RunConfig
from ldit.config.sections import EvalConfig
from ldit.eval.extractors import extractor as extractor_room

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("3b-256", "7b-256", "7b-256-unguided", "3b-512", "dit-256", "dit-256-unguided", "dit-512")
REFERENCES = ("VIRTUAL_imagenet256_labeled.npz", "VIRTUAL_imagenet512.npz")


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    real = extractor_room.open_extractor
    monkeypatch.setattr(
        extractor_room,
        "open_extractor",
        lambda name, weights, device, protocol=None: Stub() if name == "stub" else real(name, weights, device),
    )


def test_a_model_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, reference = exported(tmp_path / "model"), folder(tmp_path / "b", noise(9, 1))
    command = [
        "evaluate",
        str(model),
        "--reference",
        str(reference),
        "--extractor",
        "stub",
        "--num",
        "8",
        "--steps",
        "2",
    ]
    assert main([*command, "--labels", "random", "--json", str(tmp_path / "r.json"), "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["labels"] == "random" and report["num_samples"] == 8 and report["samples"]["sampling"]["steps"] == "2"
    said = capsys.readouterr().out
    assert all(name in said for name in report["figures"])
    assert main(["stats", str(reference), "--extractor", "stub", "--out", str(tmp_path / "s.npz")]) == 0
    assert f"9 images of 8 x 8: {tmp_path / 's.npz'}" in capsys.readouterr().out
    assert main(["evaluate", str(reference), "--reference", str(tmp_path / "s.npz"), "--extractor", "stub"]) == 0
    # The same images: what is left is the rounding of roots, some 1e-8 of the traces.
    value = float(capsys.readouterr().out.splitlines()[2].split()[1])
    assert value < 1e-8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["emoji64", "--reference", "emoji64", "--extractor", "nonsense"], "expected inception, efficientnet-lite0"),
        (["emoji64", "--reference", "nowhere.npz", "--extractor", "stub"], "nowhere.npz"),
        (["emoji64", "--reference", "emoji64", "--extractor", "stub", "--bootstrap", "9"], "--components"),
        (["nowhere", "--reference", "emoji64", "--extractor", "stub"], "nowhere"),
        (["emoji64", "--reference", "emoji64-class-xs", "--extractor", "stub"], "emoji64-class-xs"),
        (["emoji64"], "reference"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error


def test_absent_inception_weights_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("LDIT_INCEPTION_WEIGHTS", raising=False)
    assert main(["evaluate", "emoji64", "--reference", "emoji64", "--inception-weights", str(tmp_path / "no.pth")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "no.pth" in error


def test_evaluation_along_the_way_has_its_flags() -> None:
    flags = ["--eval.every", "5", "--eval.num", "9", "--eval.extractor", "stub", "--eval.reference", "r.npz"]
    config = parse_arguments(["tiny-cpu", "--out", "RUN", *flags, "--eval.batch_size", "3"]).config
    assert isinstance(config, RunConfig)
    assert config.eval == EvalConfig(every=5, num=9, reference="r.npz", extractor="stub", batch_size=3)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the references, with Inception's weights (b"sound" are the published ones), and with stubs:
    torchrun says what it is given, python knows those weights."""
    (tmp_path / "my references").mkdir()
    for reference in REFERENCES:
        (tmp_path / "my references" / reference).touch()
    (tmp_path / "weights").write_bytes(b"sound")
    digest = hashlib.sha256(b"sound").hexdigest()
    stubs = {
        "torchrun": "import json, sys\nprint(json.dumps(sys.argv[1:]))\n",
        "python": f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "from ldit.eval.extractors import inception_weights\n"
        f"inception_weights.SHA256 = {digest!r}\nassert sys.argv[1] == '-c'\nexec(sys.argv[2])\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def table(place: Path, *rows: str, **variables: str) -> tuple[int, list[list[str]], list[str]]:
    """exps/table.sh: its exit status, the words after `ldit` of each command it gave, its lines on stderr."""
    env = {"PATH": f"{place / 'bin'}:/usr/bin:/bin", "LDIT_INCEPTION_WEIGHTS": str(place / "weights"), **variables}
    script = [str(ROOT / "exps/table.sh"), str(place / "my references"), str(place / "out"), *rows]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    given = [get_args_parser().parse_args(json.loads(line)) for line in done.stdout.splitlines()]
    assert all((one.nproc_per_node, one.module, one.training_script) == ("8", True, "ldit") for one in given)
    return done.returncode, [one.training_script_args for one in given], done.stderr.splitlines()


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_the_script_of_the_table(rows: tuple[str, ...], place: Path) -> None:
    """Every command it gives is one that torchrun and the command line take."""
    variables = {"L_DIT_3B_512": "/my model", "GUIDANCE": "1.4"}
    code, commands, said = table(place, *(rows if len(rows) == 1 else ()), **variables)
    assert (code, said) == (0, []) and len(commands) == 2 * len(rows)
    for name, sample, evaluate in zip(rows, commands[::2], commands[1::2], strict=True):
        assert (sample[0], evaluate[0]) == ("sample", "evaluate")
        asked = parse(SampleRequest, sample[1:], "ldit sample")
        assert (asked.num, asked.labels, asked.steps, asked.solver) == (50000, "random", 250, "ddpm")
        assert asked.guidance == (1.0 if "unguided" in name else 1.4)
        assert (asked.source == "/my model") == (name == "3b-512")
        measured = parse(EvaluateRequest, evaluate[1:], "ldit evaluate")
        assert measured.source == str(asked.out) == str(place / f"out/{name}.npz")
        assert measured.reference == str(place / "my references" / REFERENCES["512" in name])
        assert measured.json == place / f"out/{name}.json"
    assert (place / "out").is_dir()
    bare = subprocess.run([ROOT / "exps/table.sh"], capture_output=True, text=True)
    assert bare.returncode == 2 and bare.stderr.startswith("usage: ")


@pytest.mark.parametrize(
    ("rows", "lost", "words"),
    [
        (("dit-512", "dit-256"), f"my references/{REFERENCES[0]}", f"dit-256: no file PLACE/{REFERENCES[0]}"),
        ((), f"my references/{REFERENCES[1]}", f"dit-512: no file PLACE/{REFERENCES[1]}"),
        (("dit-256",), "weights", "PLACE/weights: LDIT_INCEPTION_WEIGHTS names it, but there is no such file"),
        (("dit-256", "3b-512"), "", "3b-512: L_DIT_3B_512 names no folder of a 512 model"),
        (("dit-256", "nonsense"), "", "unknown row nonsense"),
    ],
)
def test_what_the_table_lacks_is_said_before_anything_is_made(
    rows: tuple[str, ...], lost: str, words: str, place: Path
) -> None:
    if lost:
        (place / lost).unlink()
    code, commands, said = table(place, *rows)
    said = [line for line in said if "is passed over" not in line]
    assert (code, commands, len(said)) == (2, [], 1) and not (place / "out").exists()
    assert words in said[0].replace(f"{place}/my references", "PLACE").replace(str(place), "PLACE")


def test_the_table_refuses_other_weights(place: Path) -> None:
    (place / "weights").write_bytes(b"others")
    code, commands, said = table(place, "dit-256")
    assert (code, commands, len(said)) == (2, [], 1) and "weights is not the published pt_inception" in said[0]


def test_the_table_goes_on(place: Path) -> None:
    """Rows that stand need nothing; one whose model nobody named is passed over where all are asked for."""
    (place / "out").mkdir()
    (place / "out/3b-256.json").touch()
    (place / "out/dit-512.json").touch()
    (place / "my references" / REFERENCES[1]).unlink()
    code, commands, said = table(place)
    made = [Path(parse(EvaluateRequest, one[1:], "ldit evaluate").source).stem for one in commands[1::2]]
    assert code == 0 and made == ["7b-256", "7b-256-unguided", "dit-256", "dit-256-unguided"]
    ends = ["3b-256 stands: ", "3b-512 is passed over: L_DIT_3B_512 ", "dit-512 stands: "]
    assert len(said) == 3 and all(end in line for end, line in zip(ends, said, strict=True))
    (place / "weights").unlink()
    code, commands, said = table(place, "dit-512", "3b-256")
    assert (code, commands, len(said)) == (0, [], 2)
