"""Ranks of captions: against a brute force, in the report of an evaluation, and what is said when they cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from textmodels import CAPTIONS, WIDTH, save_captioned, save_llama

from ldit.cli.main import main
from ldit.errors import EvaluationError
from ldit.eval.matching import CANDIDATES, Matcher, MatcherConfig, Matching, open_matcher, save_matcher
from ldit.rng import generator


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama`, and `matcher`, which has random weights and reads its features."""
    base = tmp_path_factory.mktemp("matching")
    save_llama(base / "llama")
    config = MatcherConfig(encoder=str(base / "llama"), max_tokens=8, text_width=WIDTH, hidden=8, width=6)
    matcher = Matcher(config)
    for name, p in matcher.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, 0, 0.3, generator=generator(0, "init", 0, name))
    save_matcher(base / "matcher", matcher, {"data": "none"})
    return base


def test_ranks_equal_a_brute_force(place: Path) -> None:
    matcher = open_matcher(str(place / "matcher"))
    others = [f"{a} {b}" for a in ("a", "the", "two", "red", "blue") for b in ("cat", "dog", "sun", "moon")] + list(
        CAPTIONS
    )
    captions = [CAPTIONS[i % 6] for i in range(9)]
    features = torch.randn(9, 1280, generator=generator(1, "features"))
    matching = Matching(matcher, captions, others)
    ranks = matching.ranks(features)
    vectors = {text: matching.embed_texts([text])[0] for text in {*others, *captions}}
    for row, caption in enumerate(captions):  # fewer than 100: all of them are candidates
        image = matcher.embed_images(features[row : row + 1])[0]
        own = float(vectors[caption] @ image)
        better = sum(float(vectors[text] @ image) > own + 1e-6 for text in {*others} - {caption})
        assert ranks[row] == 1 + better
    found = matching.metrics(features)
    assert found == {
        "caption_rank": pytest.approx(ranks.mean().item()),
        "caption_top1": pytest.approx((ranks == 1).float().mean().item()),
    }
    # Of many others each image has its own 99, the same at every call.
    many = [f"a {'red ' * (i % 5)}{'cat ' * (i // 5)}" for i in range(150)]
    assert len(set(many)) == 150
    again = Matching(matcher, captions, many).ranks(features)
    assert again.equal(Matching(matcher, captions, many).ranks(features)) and float(again.max()) <= CANDIDATES


def test_the_report_has_them(place: Path, tmp_path: Path) -> None:
    data, report = save_captioned(tmp_path / "data"), tmp_path / "report.json"
    flags = ["--reference", str(data), "--extractor", "efficientnet-lite0", "--metrics", "fd", "--json", str(report)]
    assert main(["evaluate", str(data), *flags, "--matcher", str(place / "matcher")]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["figures"][-2:] == ["caption_rank", "caption_top1"] and found["matcher"] == str(place / "matcher")
    # Eight distinct captions: six, and two of them with a word more.
    assert 1 <= found["caption_rank"] <= 8 and 0 <= found["caption_top1"] <= 1
    plain = tmp_path / "plain.json"
    assert main(["evaluate", str(data), *flags[:-1], str(plain)]) == 0
    assert "caption_rank" not in json.loads(plain.read_text())


def test_what_cannot_be_matched(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save_captioned(tmp_path / "data")
    (data / "metadata.jsonl").unlink()
    base = ["evaluate", str(data), "--reference", str(data), "--extractor", "efficientnet-lite0", "--metrics", "fd"]
    for matcher, said in (
        (str(place / "matcher"), "have no captions"),
        ("nowhere", "no image-caption matcher 'nowhere'"),
    ):
        assert main([*base, "--matcher", matcher]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") <= 2
    weights = place / "matcher" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EvaluationError, match=r"model\.safetensors is damaged"):
        open_matcher(str(place / "matcher"))
    weights.write_bytes(whole)
