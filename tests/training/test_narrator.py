"""What a run tells: five lines at the start, where it is, what it saved, what to type next; one bar on a terminal."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from folders import make_folder, over, said

from ldit.commands.train import run as train
from ldit.training import narrator
from ldit.training.narrator import Narrator


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    config = over(make_folder(tmp_path / "data"), {"train.sample_every": 2, "train.log_every": 1})
    out = tmp_path / "run"
    with said() as lines:
        assert train(config, out) == 0
    heads = [line.split()[0] for line in lines]
    assert heads[:6] == ["model", "data", "steps", "device", "out", "step"]
    assert lines[1].endswith(f"{tmp_path / 'data'}: 12 images in 3 classes")
    assert lines[2] == "steps   2 of 4 images: 0.667 epochs" and lines[3].startswith("device  cpu, 1 process, torch ")
    last = next(line for line in lines if line.startswith("step 2/2"))
    assert re.match(r"step 2/2  epoch 0\.7  loss [\d.]+  grad_norm [\d.]+  lr 0\.001 ", last), last
    assert re.search(r" [\d.]+ images/s  [\d.]+ [MG]B  \d\d:\d\d:\d\d$", last), last
    assert f"saved {out / 'checkpoints' / 'step-00000002'}" in lines
    assert f"samples: {out / 'samples' / 'step-00000002.png'}" in lines
    assert lines[-1] == f"ldit sample {out} samples from it, ldit plot {out} draws its curves"
    with said() as lines:
        assert train(config, out) == 0
    assert lines[-2:] == [
        "nothing left to do: step 2 of 2 is committed",
        f"ldit sample {out} samples from it, ldit plot {out} draws its curves",
    ]


def test_a_line_at_least_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of steps that are not logged; the time left once the speed is known, without the first step's."""
    now = [1000.0]
    monkeypatch.setattr(narrator.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(narrator.time, "strftime", lambda form: "12:34:56")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    one = Narrator(100, 200, 8, 400)
    with said() as lines:
        for step in range(101, 131):
            now[0] += 60.0 if step == 101 else 4.0
            one.step(step, 0.5)
    # The first step takes a minute, and the others four seconds each.
    assert lines.pop(1) == "the rest takes about 0:06:16 at this speed"
    assert [line.split()[1] for line in lines] == ["101/200", "109/200", "117/200", "125/200"]
    assert lines[0] == "step 101/200  epoch 2.0  loss 0.5  12:34:56"
    assert lines[1] == "step 109/200  epoch 2.2  loss 0.5  2.0 images/s  left 0:06:04  12:34:56"
    one.close()


def test_the_terminal_has_a_bar(tmp_path: Path) -> None:
    """It stands below the lines, which stay whole, and is gone in the end."""
    import pty

    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 110, 0, 0))
    script = (
        "import time\nfrom ldit.log import logger, setup\nfrom ldit.training.narrator import Narrator\n"
        "setup()\none = Narrator(0, 40, 8, 400)\n"
        "for step in range(1, 41):\n    time.sleep(0.05)\n    one.step(step, 0.25)\n"
        "    if step == 20: logger.info('saved it')\none.close()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stderr=terminal)
    os.close(terminal)
    output = b""
    began = time.monotonic()
    while time.monotonic() - began < 60:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        output += piece
    assert child.wait() == 0
    text = output.decode()
    assert re.search(r"\d+% █* *\d+/40  epoch 0\.\d  loss 0\.25  [\d.]+ images/s  left 0:00:0\d", text)
    assert re.search(r"\rsaved it\r\n", text) and text.rstrip(" ").endswith("\r")
    os.close(master)


def test_one_mistake_of_several_processes_is_one_line() -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        env = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        for arguments in (
            ["train", "tiny-cpu", "--train.stepz", "3"],
            ["train", "no-such-recipe"],
            ["sample", "--stepz", "1"],
        ):
            done = subprocess.run([sys.executable, "-m", "ldit", *arguments], env=env, capture_output=True, text=True)
            assert done.returncode == 2 and done.stderr.count("\n") == lines, (rank, arguments, done.stderr)


def test_the_configuration_is_for_those_who_ask(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", side=16)
    command = [sys.executable, "-m", "ldit", "train", "tiny-cpu", "--data.path", "data", "--model.num_classes", "3",
               "--train.steps", "1", "--out"]  # fmt: skip
    for flags, shown in ((["a"], False), (["b", "--verbose"], True)):
        done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and ("grad_clip" in done.stderr) == shown, done.stderr
