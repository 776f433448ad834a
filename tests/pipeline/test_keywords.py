"""Python's keywords are the fields of the requests, by the same names, types and aliases; and what calls return."""

import typing
from dataclasses import fields
from typing import Any

import pytest
import torch
from PIL import Image
from pipeline.models import tiny, tiny_flow

from ldit.commands.encode import EncodeKeywords
from ldit.commands.evaluate import EvaluateKeywords
from ldit.config.requests.encode import EncodeRequest
from ldit.config.requests.evaluate import EvaluateRequest
from ldit.config.requests.fields import from_keywords
from ldit.config.requests.sampling import SamplingRequest
from ldit.pipeline.keywords import RequestKeywords

DOORS = [
    (RequestKeywords, SamplingRequest, {"class_labels"}),
    (EvaluateKeywords, EvaluateRequest, {"source", "reference"}),
    (EncodeKeywords, EncodeRequest, {"path", "out"}),
]


@pytest.mark.parametrize(("keywords", "request_class", "positional"), DOORS, ids=lambda v: getattr(v, "__name__", "-"))
def test_keywords_are_the_fields(keywords: Any, request_class: Any, positional: set[str]) -> None:
    hints, given = typing.get_type_hints(request_class), typing.get_type_hints(keywords)
    expected = {}
    for entry in fields(request_class):
        for name in (entry.name, *entry.metadata.get("aliases", ())):
            if entry.name not in positional:
                expected[name] = hints[entry.name]
    assert given.keys() == expected.keys()
    # Where a request takes Any, only Python's keywords say what is meant.
    assert {name: given[name] for name, hint in expected.items() if hint is not Any and given[name] != hint} == {}


def test_names_of_other_libraries_are_the_same() -> None:
    pipe = tiny_flow()
    own = pipe.sample_latents([0], steps=3, guidance=2.0)
    assert torch.equal(own, pipe.sample_latents([0], num_inference_steps=3, guidance_scale=2.0))


def test_what_comes_back() -> None:
    pipe = tiny()
    (image,) = pipe([1], steps=1)
    assert isinstance(image, Image.Image)
    tensor, latent = (pipe.sample([1], steps=1, output_type=kind) for kind in ("tensor", "latent"))
    assert tensor.shape == (1, 3, 8, 8) and torch.equal(latent, pipe.sample_latents([1], steps=1))


def test_wrong_keywords_are_named() -> None:
    with pytest.raises(TypeError, match=r"sample\(\) got an unexpected keyword 'stepz' \(did you mean steps\?\)"):
        tiny().sample([0], stepz=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"got 'steps' twice"):
        from_keywords(SamplingRequest, {"steps": 3, "num_inference_steps": 4}, "sample")
