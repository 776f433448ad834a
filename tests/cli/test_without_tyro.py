"""Flat requests are parsed alike with tyro and without it."""

import pytest

from ldit.cli.arguments import parse
from ldit.cli.without_tyro import parse_flat
from ldit.config.requests.bench import BenchSampleRequest, BenchTrainRequest
from ldit.config.run import RunConfig
from ldit.errors import ConfigError

LINES = [
    (BenchTrainRequest, []),
    (BenchTrainRequest, ["--size", "3b", "--batch", "32", "--micro", "8", "--variants", "fused", "compiled"]),
    (BenchTrainRequest, ["--no-ema", "--json", "here.json", "--recompute", "full", "--device", "cuda"]),
    (BenchSampleRequest, ["--batch", "1", "2", "8", "--graph", "--host_modulation", "--guidance", "1"]),
    (BenchSampleRequest, ["--graphs", "--host-modulation", "--dtype", "fp16"]),
]


@pytest.mark.parametrize(("request_class", "arguments"), LINES)
def test_the_same_request(request_class: type, arguments: list[str]) -> None:
    found = parse_flat(request_class, arguments, "ldit bench")
    assert found == parse(request_class, arguments, "ldit bench")
    assert not arguments or found != request_class()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--size", "huge"], "--size: invalid choice: 'huge'"), (["--bach", "3"], "unrecognized arguments: --bach 3"),
     (["--batch", "x"], "--batch: invalid int value: 'x'"), (["--bat", "3"], "unrecognized")],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_flat(BenchTrainRequest, arguments, "ldit bench train")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_sections_need_tyro() -> None:
    with pytest.raises(ConfigError, match="needs the package tyro"):
        parse_flat(RunConfig, [], "ldit train")
