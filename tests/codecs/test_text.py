"""Text encoders against transformers' own output, and what is said when one is missing or does not fit."""

import sys
from pathlib import Path

import pytest
import torch
from textmodels import CAPTIONS, WIDTH, save_llama

from ldit.codecs.conditioners import TextConditioner
from ldit.codecs.text import TextEncoder, check_text_encoder, find_text_model, text_fingerprint
from ldit.codecs.text_features import TextFeatures
from ldit.config.spec import TextConditionerConfig
from ldit.errors import CodecError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("text") / "llama")


def test_causal_features_equal_the_decoder(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).get_decoder()
    encoder = TextEncoder(TextConditionerConfig(str(llama)))
    texts = [*CAPTIONS, "", "red " * 9]
    for size in (1, 8):
        for first in range(0, len(texts), size):
            found = encoder(texts[first : first + size])
            for row, ids in enumerate(encoder.tokens(texts[first : first + size])):
                assert (ids[0], ids[-1]) == (1, 2)  # BOS and EOS
                with torch.no_grad():  # unpadded, and without a mask
                    expected = decoder(torch.tensor([ids])).last_hidden_state[0]
                assert found.mask[row].sum() == len(ids) and not found.mask[row, len(ids) :].any()
                torch.testing.assert_close(found.features[row, : len(ids)], expected, rtol=0, atol=1e-6)
                assert not found.features[row, len(ids) :].any()
    # To the last bit whatever is beside it.
    alone, together = encoder(texts[1:2]), encoder(texts)
    assert together.features[1][together.mask[1]].equal(alone.features[0])
    cut = TextEncoder(TextConditionerConfig(str(llama), max_tokens=4))
    assert cut.tokens(["a red cat on the moon", ""]) == [[1, 4, 5, 8], [1, 2]]  # cut at the end, as the original does


def test_features_of_the_packaged_encoder() -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder = TextEncoder(TextConditionerConfig(MINILM, max_tokens=16))
    folder = find_text_model(MINILM)
    assert folder is not None and encoder.folder == folder and not encoder.is_causal and encoder.width == 384
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    texts = ["3d firefighter, dark skin tone", "cat", "", "word " * 40]
    found = encoder(texts)
    for row, text in enumerate(texts):
        ids = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            expected = model.eval()(**ids).last_hidden_state[0]
        assert found.mask[row].sum() == len(expected)
        torch.testing.assert_close(found.features[row, : len(expected)], expected, rtol=0, atol=5e-6)


def test_streamed_layers_give_the_same_features(llama: Path) -> None:
    plain, streamed = (TextEncoder(TextConditionerConfig(str(llama)), offload=offload) for offload in (False, True))
    assert all(p.numel() == 0 for p in streamed.model.layers.parameters())
    for _ in range(2):
        assert streamed(CAPTIONS).features.equal(plain(CAPTIONS).features)
        assert all(p.numel() == 0 for p in streamed.model.layers.parameters())
    rest = [p for name, p in streamed.model.named_parameters() if not name.startswith("layers")]
    assert rest and all(p.numel() for p in rest)


def test_fingerprint_covers_weights_and_tokenizer(llama: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other")
    assert text_fingerprint(llama, llama) == text_fingerprint(other, other)
    for name, place in (("model.safetensors", -1), ("tokenizer.json", -2), ("config.json", -2)):
        path = other / name
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        assert text_fingerprint(llama, llama) != text_fingerprint(other, other)
        data[place] ^= 1
        path.write_bytes(data)


def test_what_is_missing_is_named_in_one_line(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_bos = save_llama(tmp_path / "no-bos", bos=False)
    with pytest.raises(CodecError, match="no-bos: its tokenizer has no BOS token"):
        TextEncoder(TextConditionerConfig(str(no_bos)))
    with pytest.raises(CodecError, match=r"its features are 32 wide, the model takes 64 \(cap_feat_dim\)"):
        check_text_encoder(TextConditionerConfig(str(llama)), 64)
    with pytest.raises(CodecError, match="takes at most 256 tokens, max_tokens is 300"):
        check_text_encoder(TextConditionerConfig(str(llama), 300), WIDTH)
    with pytest.raises(CodecError, match="'nowhere' was not found: no such folder"):
        check_text_encoder(TextConditionerConfig("nowhere"), WIDTH)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CodecError, match=r"empty: cannot read config\.json"):
        check_text_encoder(TextConditionerConfig(str(tmp_path / "empty")), WIDTH)
    (no_bos / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CodecError, match=r"^text encoder .*no-bos: [^\n]*$"):
        TextEncoder(TextConditionerConfig(str(no_bos)))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CodecError, match=r"pip install 'large-dit\[text\]'"):
        check_text_encoder(TextConditionerConfig(str(llama)), WIDTH)


def test_roots_and_tokenizer_of_another_folder(llama: Path, tmp_path: Path) -> None:
    assert find_text_model("org/llama", [llama.parent]) == llama
    encoder = TextEncoder(TextConditionerConfig("meta/llama", tokenizer=str(llama)), [llama.parent])
    assert encoder.folder == llama and encoder.tokens(["cat"]) == [[1, 8, 2]]


def test_each_text_is_encoded_once(llama: Path) -> None:
    encoder = TextEncoder(TextConditionerConfig(str(llama)))
    asked: list[list[str]] = []

    class Counted:
        def __call__(self, texts: list[str]) -> object:
            asked.append(list(texts))
            return encoder(texts)

    features = TextFeatures(lambda: Counted())  # type: ignore[arg-type, return-value]
    conditioner = TextConditioner(CAPTIONS, "", 0.5, features, length=9)
    first = conditioner.encode(torch.tensor([0, 3, 0, conditioner.null]))
    assert first.features.shape == (4, 9, WIDTH) and asked == [[CAPTIONS[0], CAPTIONS[3], ""]]
    again = conditioner.encode([3, 0])
    assert len(asked) == 1 and again.features[1].equal(first.features[0]) and again.mask[0].equal(first.mask[1])
    null = conditioner.encode_null(2)
    assert null.features[1].equal(first.features[3]) and null.mask[0].sum() == 2  # BOS and EOS
    dropped = conditioner.drop(torch.tensor([0, 1]), torch.tensor([0.49, 0.5]))
    assert dropped.tolist() == [len(CAPTIONS), 1]
    # Without memory every call encodes.
    forgetful = TextFeatures(lambda: Counted(), memory=0)  # type: ignore[arg-type, return-value]
    asked.clear()
    assert all(forgetful(["cat"])[0].equal(forgetful(["cat"])[0]) for _ in range(2)) and len(asked) == 4
