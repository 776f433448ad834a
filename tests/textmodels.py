"""Tiny text encoders on the disk, and captioned images, for tests of text models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("a", "red", "green", "blue", "cat", "dog", "sun", "of", "the", "two", "on", "moon")
CAPTIONS = ("a red cat", "the green dog", "two blue sun", "a moon", "red dog on the sun", "a cat of the moon")
WIDTH = 32


def save_llama(folder: Path, bos: bool = True, **changes: Any) -> Path:
    """A randomly initialised LLaMA with a tokenizer of WORDS, as `save_pretrained` writes them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": len(WORDS) + 4, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **changes,
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, bos)
    return folder


def save_tokenizer(folder: Path, bos: bool = True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>"} if bos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", **special).save_pretrained(
        folder
    )


def save_captioned(root: Path, count: int = 12, side: int = 8) -> Path:
    """Images of noise with a metadata.jsonl: every third one has two captions of different weight."""
    root.mkdir(parents=True)
    random, lines = np.random.RandomState(3), []
    for i in range(count):
        pixels = random.randint(0, 256, (side, side, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02}.png")
        first = CAPTIONS[i % len(CAPTIONS)]
        more = {"text": [first, f"the {first}"], "weights": [3, 1]} if i % 3 == 0 else {"text": first}
        lines.append(json.dumps({"file_name": f"{i:02}.png", **more}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root
