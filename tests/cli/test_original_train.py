"""The original's train.py: each flag, its default, its mistakes, the scripts of exps/, and two real steps."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldit.cli.arguments import parse
from ldit.cli.original.train import OriginalTrainArguments, run, run_config
from ldit.commands.original_run import check_start
from ldit.config.presets import PRESETS, preset, text_preset
from ldit.config.run import RunConfig
from ldit.config.sections import DataConfig, OptimConfig, ParallelConfig, TextConfig, TrainConfig
from ldit.config.spec import AutoencoderConfig, DDPMConfig, PixelCodecConfig
from ldit.errors import CodecError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["--model", "DiT_Llama_600M_patch2", "--data_path", "/data", "--results_dir", "out"]
DEFAULT = RunConfig(
    model=preset("DiT_Llama_600M_patch2"),
    process=DDPMConfig(),
    codec=AutoencoderConfig("stabilityai/sd-vae-ft-ema"),
    data=DataConfig("/data", 256, workers=4),
    train=TrainConfig(
        steps=100_000,
        batch_size=256,
        micro_batch_size=1,
        lr=1e-4,
        seed=0,
        precision="bf16",
        reduce_precision="bf16",
        grad_clip=2.0,
        log_every=100,
        checkpoint_every=50_000,
        keep=0,
        init_ema=False,
    ),
    optim=OptimConfig(weight_decay=0.0),
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "RANK"):
            monkeypatch.delenv(name)


def parsed(*flags: str) -> OriginalTrainArguments:
    return parse(OriginalTrainArguments, [*NEEDED, *flags], "train.py")


def changed(section: str, **values: Any) -> RunConfig:
    return replace(DEFAULT, **{section: replace(getattr(DEFAULT, section), **values)})


def test_defaults_are_the_originals() -> None:
    args = parsed()
    assert run_config(args) == DEFAULT
    run_config(args).check()
    assert DEFAULT.sampling is None and DEFAULT.ema.decay == 0.9999 and DEFAULT.data.flip
    assert (DEFAULT.optim.kind, DEFAULT.optim.beta1, DEFAULT.optim.beta2) == ("adamw", 0.9, 0.999)
    assert (DEFAULT.model.class_dropout_prob, DEFAULT.model.learn_sigma, DEFAULT.model.qk_norm) == (0.1, True, False)
    assert (DEFAULT.train.schedule, DEFAULT.train.warmup, DEFAULT.parallel) == ("constant", 0, ParallelConfig())
    assert (args.results_dir, args.auto_resume, args.resume, args.master_port) == (Path("out"), True, None, None)


FLAGS: list[tuple[Sequence[str], RunConfig]] = [
    *[(["--model", name], replace(DEFAULT, model=preset(name))) for name in PRESETS],
    (["--data_path", "/elsewhere"], changed("data", path="/elsewhere")),
    (["--image_size", "512"], replace(changed("data", image_size=512), model=replace(DEFAULT.model, input_size=64))),
    (["--num_classes", "7"], changed("model", num_classes=7)),
    (["--global_batch_size", "512"], changed("train", batch_size=512)),
    (["--micro_batch_size", "32"], changed("train", micro_batch_size=32)),
    (["--lr", "2e-4"], changed("train", lr=2e-4)),
    (["--wd", "0.1"], changed("optim", weight_decay=0.1)),
    (["--grad_clip", "1.5"], changed("train", grad_clip=1.5)),
    (["--max_steps", "3000000"], changed("train", steps=3_000_000)),
    (["--ckpt_every", "10000"], changed("train", checkpoint_every=10_000)),
    (["--log_every", "7"], changed("train", log_every=7)),
    (["--precision", "fp32"], changed("train", precision="fp32", reduce_precision="fp32")),
    (["--precision", "tf32"], changed("train", precision="tf32", reduce_precision="fp32")),
    (["--precision", "fp16"], changed("train", precision="fp16", reduce_precision="fp16")),
    (["--grad_precision", "fp32"], changed("train", reduce_precision="fp32")),
    (["--grad_precision", "tf32"], changed("train", reduce_precision="fp32")),
    (["--grad_precision", "fp16"], changed("train", reduce_precision="fp16")),
    (["--precision", "fp32", "--grad_precision", "bf16"], changed("train", precision="fp32")),
    (["--global_seed", "3"], changed("train", seed=3)),
    (["--vae", "mse"], replace(DEFAULT, codec=AutoencoderConfig("stabilityai/sd-vae-ft-mse"))),
    (["--num_workers", "0"], changed("data", workers=0)),
    (["--data_parallel", "fsdp"], DEFAULT),
    (["--data_parallel", "sdp"], changed("parallel", reshard=False)),
    (["--data_parallel", "hsdp"], changed("parallel", replicate=1, shard=1)),
    (["--qk_norm"], changed("model", qk_norm=True)),
    (["--init_from", "there"], changed("train", init_from="there")),
    (["--no_auto_resume", "--resume", "x", "--master_port", "9000"], DEFAULT),
    (["--model_parallel_size", "2"], changed("parallel", tp=2)),
]


@pytest.mark.parametrize(("flags", "expected"), FLAGS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_each_flag(flags: list[str], expected: RunConfig) -> None:
    spelled = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in flags]
    assert run_config(parsed(*flags)) == run_config(parsed(*spelled)) == expected
    expected.check()


def test_every_flag_is_tested() -> None:
    given = {flag.removeprefix("--") for flags, _ in FLAGS for flag in flags if flag.startswith("--")}
    fields = set(OriginalTrainArguments.__dataclass_fields__)
    of_text = {"lm", "tokenizer_path", "caption_dropout_prob", "max_text_tokens", "rope_scaling_factor"}
    assert fields - given - {"auto_resume", "results_dir", "local_diffusers_model_root"} == of_text
    assert parsed("--no_auto_resume").auto_resume is False
    assert (parsed("--resume", "x").resume, parsed("--master_port", "9").master_port) == (Path("x"), 9)


def test_flags_of_text_models(tmp_path: Path) -> None:
    lm = tmp_path / "lm"
    lm.mkdir()
    (lm / "config.json").write_text('{"hidden_size": 4096}')
    config = run_config(parsed("--lm", str(lm), "--data_path", "set.yaml", "--tokenizer_path", "there"))
    config.check()
    text = TextConfig(str(lm), "there", 128, 0.1, "bf16")
    model = text_preset("DiT_Llama_600M_patch2", max_seq_len=288, cap_feat_dim=4096)
    assert config.text == text and config.model == model
    assert config.data == DataConfig("set.yaml", 256, flip=False, workers=4, buckets=True)
    more = ["--caption_dropout_prob", "0.2", "--max_text_tokens", "64", "--rope_scaling_factor", "2", "--qk_norm"]
    large = run_config(parsed("--lm", str(lm), "--image_size", "512", *more))
    assert large.text == TextConfig(str(lm), "", 64, 0.2, "bf16")
    assert large.model == replace(model, max_seq_len=1088, rope_scaling_factor=2.0, qk_norm=True)
    assert run_config(parsed("--tokenizer_path", str(lm))).text == TextConfig(str(lm), "", 128, 0.1, "bf16")
    with pytest.raises(CodecError, match="the text encoder 'nowhere' was not found"):
        run_config(parsed("--lm", "nowhere"))
    for flags in more[:2], more[2:4], more[4:6]:
        with pytest.raises(ConfigError, match=f"{flags[0]}: is for text models"):
            run_config(parsed(*flags))


def test_pixels_take_any_even_size() -> None:
    config = run_config(parsed("--vae", "pixels", "--image_size", "18", "--model", "XS"))
    assert (config.codec, config.data.image_size) == (PixelCodecConfig(), 18)
    assert config.model == preset("XS", input_size=18, in_channels=3)
    config.check()


def test_a_local_autoencoder(tmp_path: Path) -> None:
    flags = ("--local_diffusers_model_root", str(tmp_path), "--vae", "mse")
    with pytest.raises(ConfigError, match=f"there is no folder {tmp_path}/stabilityai/sd-vae-ft-mse$"):
        run_config(parsed(*flags))
    (folder := tmp_path / "stabilityai" / "sd-vae-ft-mse").mkdir(parents=True)
    assert run_config(parsed(*flags)).codec == AutoencoderConfig(str(folder))


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (1, 1)),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "0"}, (2, 8)),
        ({"WORLD_SIZE": "8", "RANK": "0"}, (1, 8)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "24", "SLURM_STEP_NUM_NODES": "3"}, (3, 8)),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "24"}, (1, 1)),
        ({"WORLD_SIZE": "12", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE: 8 does not divide WORLD_SIZE 12"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE: expected a number of processes, got 'many'"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "9", "SLURM_STEP_NUM_NODES": "2"}, "hsdp: 9 processes"),
    ],
)
def test_hybrid_sharding_follows_the_nodes(
    env: dict[str, str], expected: tuple[int, int] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    args = parsed("--data_parallel", "hsdp")
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            run_config(args)
    else:
        assert run_config(args).parallel == ParallelConfig(replicate=expected[0], shard=expected[1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "DiT_Llama2_7B"], "unknown model 'DiT_Llama2_7B' \\(known: DiT_Llama_600M_patch2"),
        (["--image_size", "384"], "--image_size: expected 256 or 512 with --vae ema, got 384"),
        (["--vae", "pixels", "--image_size", "17"], "--image_size: expected any even number with --vae pixels"),
        (["--vae", "pixels", "--image_size", "0"], "--image_size"),
        (["--vae", "pixels", "--local_diffusers_model_root", "/"], "--vae pixels has no autoencoder"),
        (["--vae", "kl"], "kl"),
        (["--precision", "fp8"], "fp8"),
        (["--data_parallel", "ddp"], "ddp"),
        (["--max_steps", "many"], "many"),
        (["--micro_batch_size", "3"], "--micro_batch_size: 3 does not divide batch_size 256"),
        (["--num_classes", "-1"], "--num_classes"),
    ],
)
def test_mistakes(flags: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run([*NEEDED[:-1], str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_needed_flags() -> None:
    for flag in range(0, 6, 2):
        with pytest.raises(ConfigError, match=NEEDED[flag].replace("_", "[-_]")):
            parse(OriginalTrainArguments, NEEDED[:flag] + NEEDED[flag + 2 :], "train.py")


# Where a run goes on


def test_starts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_start(out, auto_resume=True, resume=None)
    check_start(out, auto_resume=False, resume=None)
    for step in (50, 100):
        (out / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    old, new = sorted((out / "checkpoints").iterdir())
    check_start(out, auto_resume=True, resume=None)
    check_start(out, auto_resume=True, resume=new)
    check_start(out, auto_resume=False, resume=out / "." / "checkpoints" / ".." / "checkpoints" / new.name)
    for auto, resume, said in (
        (False, None, r"--no_auto_resume: .*out already holds step 100"),
        (True, old, r"--resume: .*out holds the newer step 100; .*--init_from .*step-00000050$"),
        (True, out, r"--resume: .*out is not a committed step of .*out/checkpoints"),
        (True, tmp_path / "nowhere", r"--resume: there is no folder .*nowhere$"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_start(out, auto, resume)


def test_the_originals_own_results_are_not_written_into(tmp_path: Path) -> None:
    for step in ("0010000", "0020000", "0030000"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        if step != "0030000":  # half written
            (tmp_path / "checkpoints" / step / "consolidated.00-of-01.pth").touch()
    for auto in (True, False):
        with pytest.raises(ConfigError, match=r"checkpoints of the original.*--init_from .*checkpoints/0020000$"):
            check_start(tmp_path, auto, None)
    with pytest.raises(ConfigError, match=r"--resume: .*0020000 is not a committed step"):
        check_start(tmp_path, True, tmp_path / "checkpoints" / "0020000")


def test_a_port_of_the_launcher_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldit.commands.train.train", lambda config, out: 0)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    command = [*NEEDED[:-1], str(tmp_path / "out")]
    assert run(command) == 0 and "MASTER_PORT" not in os.environ
    for given, port in (("9000", "9000"), ("9001", "9000")):
        assert run([*command, "--master_port", given]) == 0 and os.environ["MASTER_PORT"] == port


# Programs


def program(*arguments: object, check: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-u", str(ROOT / "train.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == check, done.stderr
    return done


def test_two_real_steps_and_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    out = tmp_path / "out"
    command = ["--model", "XS", "--data_path", tmp_path / "data", "--results_dir", out, "--vae", "pixels",
               "--image_size", 16, "--num_classes", 2, "--global_batch_size", 4, "--micro_batch_size", 2,
               "--max_steps", 2, "--log_every", 1, "--precision", "fp32", "--qk_norm", "--num_workers", 0]  # fmt: skip
    program(*command)
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    step = out / "checkpoints" / "step-00000002"
    assert (step / "manifest.json").is_file()
    assert RunConfig.from_json(json.loads((out / "config.json").read_text())).model.qk_norm is True
    assert "nothing left to do" in program(*command, "--resume", step).stderr
    said = program(*command, "--no_auto_resume", check=2).stderr
    assert said == f"ldit: --no_auto_resume: {out} already holds step 2; choose another --results_dir or resume it\n"


@pytest.mark.parametrize(
    "code",
    [
        "from ldit.cli.main import main; main(['plot', '--help'])",
        "from ldit.cli.main import main; main(['launch', '--help'])",
        "from ldit.cli.main import main; main(['launch', 'slurm', '--help'])",
        "from ldit.cli.original.train import run; run(['--help'])",
    ],
)
def test_help_is_quick_and_torch_free(code: str) -> None:
    """In seconds of this process's own work, so that a busy machine does not count."""
    guarded = (
        f"import sys, time\ntry: {code}\nexcept SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and time.process_time() <= 0.5, time.process_time()"
    )
    done = [subprocess.run([sys.executable, "-c", guarded], capture_output=True, text=True) for _ in range(2)]
    assert not all(one.returncode for one in done), done[0].stderr


SCRIPTS = {
    "dit_llama_600M_bs256_lr1e-4_bf16_qknorm": ("DiT_Llama_600M_patch2", 256, 256, 32),
    "dit_llama_3B_bs256_lr1e-4_bf16_qknorm": ("DiT_Llama_3B_patch2", 256, 256, 32),
    "dit_llama_7B_bs512_lr1e-4_bf16_qknorm": ("DiT_Llama_7B_patch2", 256, 512, 32),
    "dit_llama_3B_512px_bs256_lr1e-4_bf16_qknorm": ("DiT_Llama_3B_patch2", 512, 256, 8),
}


def test_every_script_is_tested() -> None:
    own = {"table", "dit_llama_t2i_3B_bs512_lr1e-4_bf16_qknorm"}  # of test_evaluate.py, and below
    assert {path.stem for path in (ROOT / "exps").glob("*.sh")} == SCRIPTS.keys() | own


def test_the_script_of_the_text_model(tmp_path: Path) -> None:
    flags = _printed("dit_llama_t2i_3B_bs512_lr1e-4_bf16_qknorm", ["/set.yaml", str(tmp_path)], tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 4096}')
    config = run_config(parse(OriginalTrainArguments, flags, "train.py"))
    config.check()
    assert config.model == text_preset("DiT_Llama_3B_patch2", max_seq_len=288, cap_feat_dim=4096, qk_norm=True)
    assert (config.data.path, config.text.encoder, config.train.batch_size) == ("/set.yaml", str(tmp_path), 512)


def _printed(name: str, given: list[str], tmp_path: Path) -> list[str]:
    """What a script gives to train.py."""
    stub = tmp_path / "torchrun"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    script = ROOT / "exps" / f"{name}.sh"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([script, *given], env=env, capture_output=True, text=True, cwd=tmp_path)
    launcher, count, program_path, *flags = json.loads(done.stdout)
    assert (launcher, count) == ("--nproc_per_node", "8") and Path(program_path).resolve() == ROOT / "train.py"
    return [str(flag) for flag in flags]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name: str, tmp_path: Path) -> None:
    stub = tmp_path / "torchrun"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    script = ROOT / "exps" / f"{name}.sh"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    bare = subprocess.run([script], env=env, capture_output=True, text=True)
    assert (bare.returncode, bare.stdout) == (2, "") and bare.stderr.startswith(f"usage: {script} DATA_PATH")
    done = subprocess.run(
        [script, "/my data", "--global_seed", "5"], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    launcher, count, program_path, *flags = json.loads(done.stdout)
    assert (launcher, count) == ("--nproc_per_node", "8") and Path(program_path).resolve() == ROOT / "train.py"
    args = parse(OriginalTrainArguments, flags, "train.py")
    model, size, batch, micro = SCRIPTS[name]
    side = size // 8
    expected = changed(
        "train", batch_size=batch, micro_batch_size=micro, steps=3_000_000, checkpoint_every=10_000,
        reduce_precision="fp32", seed=5,
    )  # fmt: skip
    expected = replace(
        expected, model=preset(model, input_size=side, qk_norm=True), data=DataConfig("/my data", size, workers=4)
    )
    assert (run_config(args), args.results_dir) == (expected, Path("results") / name)
    expected.check()
    assert batch % (8 * micro) == 0
