"""Sets of images that are stopped, killed or damaged at any place: the same command ends in the same bytes."""

import errno
import logging
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from calls import counted, in_child
from pipeline.sets import BATCH, BLOCKS, KINDS, NUM, contents, job, made
from smallrun import one_thread

from ldit.cli.main import main
from ldit.errors import RunError
from ldit.pipeline.sets import make as flow
from ldit.pipeline.sets.make import BlockSampler


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", range(BLOCKS))
def test_it_goes_on_where_it_failed(
    source: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, stop: int,
) -> None:  # fmt: skip
    """What stands is not made again; nothing half written stays."""
    out, sound, numbers = tmp_path / kind, BlockSampler._block, []

    def block(self: BlockSampler, number: int, stopped: threading.Event) -> Any:
        numbers.append(number)
        if number == stop and failing:
            raise RuntimeError("injected")
        return sound(self, number, stopped)

    monkeypatch.setattr(BlockSampler, "_block", block)
    failing = True
    with pytest.raises(RuntimeError, match="injected"):
        made(monkeypatch, job(source), out)
    between = contents(out) if kind == "set" else contents(tmp_path / f"{kind}.parts")
    assert not any(".work" in name for name in between) and not (tmp_path / "set.npz").exists()
    standing = (len(between) - 2) // BATCH if kind == "set" else len(between) - 2
    assert standing == stop
    failing, numbers = False, []
    assert made(monkeypatch, job(source), out) and contents(out) == whole[kind]
    assert sorted(numbers) == list(range(standing, BLOCKS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_set_is_left_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """No weights are read, wherever the source lies now; what a killed process left over goes."""
    out = tmp_path / kind
    assert made(monkeypatch, job(source, num=5), out)
    before = contents(out)
    if kind != "set":
        (tmp_path / "set.npz.parts").mkdir()
        (tmp_path / "set.npz.parts/samples.json").write_text("{")
    moved = tmp_path / "moved"
    moved.symlink_to(source)
    monkeypatch.setattr(flow, "load_source", None)
    with caplog.at_level(logging.INFO, "ldit"):
        logging.getLogger("ldit").propagate = True
        assert made(monkeypatch, job(moved, num=5), out)
    assert contents(out) == before and "nothing is left to do" in caplog.text


def test_a_image_that_was_lost_is_made_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed, or left empty by a file system that lost power."""
    out = tmp_path / "set"
    assert made(monkeypatch, job(source), out)
    before = contents(out)
    (out / "000003.png").unlink()
    (out / "000021.png").write_bytes(b"")
    assert made(monkeypatch, job(source), out) and contents(out) == before


def test_a_damaged_block_of_an_array_is_made_again(
    source: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set.npz"
    assert not made(monkeypatch, job(source), out, 0, 2)
    part = min((tmp_path / "set.npz.parts").glob("*.npy"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(bytes(data))
    assert made(monkeypatch, job(source), out) and contents(out) == whole["set.npz"]


@pytest.mark.parametrize("kind", KINDS)
def test_death_at_every_call_that_changes_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The same command ends in the same bytes, and at no time is there a half file of a final name."""
    small = job(source, num=3, batch_size=2, options={"steps": "1"})

    def run(place: Path) -> int:
        place.mkdir(exist_ok=True)
        return 0 if made(monkeypatch, small, place / kind) else 1

    def disturbed(place: Path, number: int) -> int:
        left = [number]

        def die(count: int, name: str) -> None:
            left[0] -= name != "open"  # whose death is that of the call before
            if not left[0]:
                os._exit(7)

        with counted(die):
            return run(place)

    with one_thread():
        assert run(tmp_path / "alone") == 0
        alone, number = contents(tmp_path / "alone" / kind), 1
        while (code := in_child(partial(disturbed, place := tmp_path / str(number), number))) == 7:
            between = contents(place / kind)
            for name in between.keys() & alone.keys():
                assert name.endswith("json") or between[name] == alone[name], (number, name)
            assert run(place) == 0 and contents(place / kind) == alone, number
            number += 1
    assert code == 0 and number > 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_work_of_the_living_is_left_alone(
    source: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Another process begins and ends its share while this one is at a block."""
    out, sound, others = tmp_path / kind, BlockSampler._counted, [1]

    def counting(self: BlockSampler, one: Any) -> Any:
        if others:
            assert not made(monkeypatch, job(source), out, others.pop(), 2)
        return sound(self, one)

    monkeypatch.setattr(BlockSampler, "_counted", counting)
    assert made(monkeypatch, job(source), out, 0, 2) and not others and contents(out) == whole[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_loses_nothing(
    source: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One line that says how much is needed; the same command goes on."""
    out, renames, sound = tmp_path / kind, [0], os.replace

    def full(*arguments: Any) -> None:
        renames[0] += 1
        if renames[0] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        sound(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(
            RunError, match="was not written: No space left on device: it needs about 768 bytes \\(4,224 in all\\), "
        ):
            made(monkeypatch, job(source), out)
    assert made(monkeypatch, job(source), out) and contents(out) == whole[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_it_between_steps(
    source: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], kind: str, number: int,
) -> None:  # fmt: skip
    """With its exit code, one line and no remains; the same command goes on."""
    out, sound, told = tmp_path / kind, BlockSampler._block, []

    def block(self: BlockSampler, index: int, stopped: threading.Event) -> Any:
        if index == 3:
            os.kill(os.getpid(), number)
            told.append(stopped.wait(20))
        return sound(self, index, stopped)

    command = ["sample", "--ckpt", str(source), "--num", str(NUM), "--out", str(out), "--seed", "5", "--steps", "3",
               "--batch-size", str(BATCH), "--device", "cpu"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(BlockSampler, "_block", block)
        assert main(command) == 128 + number and told == [True]
    error = capsys.readouterr().err
    assert f"what is finished of {out} is kept" in error and "Traceback" not in error
    assert not list(tmp_path.rglob(".work-*"))
    assert main(command) == 0 and contents(out) == whole[kind]
    assert capsys.readouterr().out.splitlines() == [str(out)]


def test_a_second_process_of_the_same_rank_is_no_harm(
    source: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ends the set while this one is at a block: it finds that out and ends well."""
    for kind in KINDS:
        out, sound, inside = tmp_path / kind, BlockSampler._counted, [False]

        def counting(self: BlockSampler, made_: Any, out: Path = out, sound: Any = sound, inside: Any = inside) -> Any:
            if not inside[0]:
                inside[0] = True
                assert made(monkeypatch, job(source), out)
            return sound(self, made_)

        with monkeypatch.context() as patch:
            patch.setattr(BlockSampler, "_counted", counting)
            assert made(monkeypatch, job(source), out)
        assert inside[0] and contents(out) == whole[kind]
