"""Parquet files and Arrow folders: the same images, classes and captions as files have; one line for what is none."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldit.data.source import open_data
from ldit.errors import DataError, RunError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(value: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(data, "PNG")
    return data.getvalue()


def table(values: list[int], metadata: dict[str, str] | None = None, **columns: Any) -> Any:
    """Rows with the image in a struct, as `datasets` stores it."""
    images = [{"bytes": png(value), "path": None} for value in values]
    made = pa.table({"image": images, **columns})
    return made if metadata is None else made.replace_schema_metadata(metadata)


def save_arrow(folder: Path, *tables: Any) -> None:
    """A folder as `datasets.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, one in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, one.schema) as writer:
            writer.write_table(one, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def test_parquet_and_arrow_read_alike(tmp_path: Path) -> None:
    names = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["zebra", "ant"]}}}})}
    parts = [
        table([1, 2, 3], names, label=[0, 1, 0], text=[["a"], ["b", "c"], ["d"]]),
        table([4, 5], names, label=[1, 1], text=[["e"], ["f"]]),
    ]
    folder = tmp_path / "parquet"
    folder.mkdir()
    for i, part in enumerate(parts):
        pq.write_table(part, folder / f"{i}.parquet", row_group_size=2)
    save_arrow(tmp_path / "arrow", *parts)
    (folder / "heldout.txt").write_text("0.parquet[1]\n")
    (tmp_path / "arrow" / "heldout.txt").write_text("data-00000-of-00002.arrow[1]\n")
    for root in (folder, tmp_path / "arrow"):
        train, heldout = open_data(str(root), 4)
        assert heldout is not None and train.names == ("ant", "zebra")
        rows = [(int(train[i][0][0, 0, 0]), train.names[train[i][1]]) for i in range(4)]
        assert rows == [(1, "zebra"), (3, "zebra"), (4, "ant"), (5, "ant")]
        assert int(heldout[0][0][0, 0, 0]) == 2 and train.where(2).endswith("[0]")
        captions = train.captions()
        assert [captions.texts[captions.main(train.caption_row(i))] for i in range(4)] == ["a", "d", "e", "f"]
        assert captions.texts[captions.draw(heldout.caption_row(0), 0.9)] == "c"
        out = np.empty((3, 4, 4), np.float32)
        assert train.read(3, False, out) == 0 and out[0, 0, 0] == np.float32(5) / np.float32(127.5) - 1


def test_plain_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [png(7), png(8)], "caption": ["x", "y"], "other": [1, 2]}), tmp_path / "a.parquet")
    data, _ = open_data(str(tmp_path), 4)
    assert data.names == () and int(data[1][0][0, 0, 0]) == 8 and list(data.captions().texts) == ["x", "y"]
    pq.write_table(pa.table({"img": [png(7)], "cls": ["b"]}), tmp_path / "a.parquet")
    data, _ = open_data(str(tmp_path), 4)
    assert data.names == ("b",)
    with pytest.raises(DataError, match=r"a\.parquet, row 0: no caption \(text or caption or prompt\)"):
        data.captions()
    pq.write_table(pa.table({"image": [png(7), b"no image"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"cannot read image .*a\.parquet\[1\]"):
        open_data(str(tmp_path), 4)[0][1]


def test_what_is_no_table(tmp_path: Path) -> None:
    def refused(said: str) -> None:
        with pytest.raises(DataError, match=said) as caught:
            open_data(str(tmp_path), 4)
        assert "\n" not in str(caught.value)

    path = tmp_path / "a.parquet"
    for content in (b"", b"PAR1", b"no parquet at all", b"PAR1" + b"x" * 100 + b"PAR1"):
        path.write_bytes(content)
        refused(r"a\.parquet: ")
    pq.write_table(pa.table({"x": [1]}), path)
    refused(r"a\.parquet: no column of images")
    pq.write_table(pa.table({"image": [png(1)], "label": [-1]}), path)
    refused("its label -1 is not a class")
    # A file that is damaged after it was opened is the machine's fault.
    pq.write_table(pa.table({"image": [png(1)]}), path)
    data, _ = open_data(str(tmp_path), 4)
    path.write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"a\.parquet"):
        data[0]
    path.unlink()
    for state, said in (
        ("{}", "is not that of a data set folder"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "there is no file '../a.arrow' in the folder"),
        ('{"_data_files": [{"filename": "a.arrow"}]}', "there is no file 'a.arrow' in the folder"),
    ):
        (tmp_path / "state.json").write_text(state)
        refused(said)
    (tmp_path / "a.arrow").write_bytes(b"x")
    refused(r"a\.arrow: ")
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    (tmp_path / "dataset_dict.json").write_text("{}")
    refused("holds the parts test, train of a set: name one of these folders")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": [png(1)]}), tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'large-dit\[data\]'"):
        open_data(str(tmp_path), 4)
