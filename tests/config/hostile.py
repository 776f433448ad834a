"""Command lines and configurations that must be refused, each drawn from a number."""

import dataclasses
import json
import random
import types
import typing
from typing import Any

from ldit.config.recipes.registry import recipe
from ldit.config.run import RunConfig

# Sections whose flags are drawn; strings (paths, projects) are free and none of the parser's business, switches have
# a test of their own.
SECTIONS = ("train", "parallel", "guard", "optim", "ema", "heldout", "data", "track")
JUNK = ["x", "", "{}", "[1]", "½", "1;rm -rf /", "$(id)", "../../etc/passwd", "\u202e7", "a\nb", "\x1b[31m1", "None ",
        "'", "\"", "%s%n", "A" * 5000, "0x1g", "1..5", "1e", "e5", "NULL", "\x00", "🙂"]  # fmt: skip
NO_INTEGER = [*JUNK, "1.5", "1e3", "nan", "inf", "-inf", "0x10", "9" * 5000, "True", "1/2", "--"]
NO_FLOAT = [*JUNK, "1,5", "1/2", "nan", "-inf", "1e3x", "True", "0x10"]
LEAST = {
    "train.steps": 1, "train.batch_size": 1, "train.warmup": 0, "train.cooldown": 0, "train.log_every": 0,
    "train.checkpoint_every": 0, "train.sample_every": 0, "train.attention_every": 0, "train.keep": 0,
    "train.keep_every": 0, "train.micro_batch_size": 1, "guard.limit": 1, "parallel.tp": 1, "parallel.shard": 0,
    "parallel.replicate": 1, "data.workers": 0, "data.max_per_class": 0, "heldout.every": 0, "heldout.num": 0,
    "ema.snapshot_every": 0,
}  # fmt: skip
OUTSIDE = {"train.grad_clip": "-0.5", "guard.spike_z": "-1", "optim.weight_decay": "-1e-9", "train.lr": "0",
           "parallel.timeout": "-3", "optim.beta1": "1", "optim.beta2": "-0.1", "optim.momentum": "1.0",
           "ema.decay": "1", "ema.more": "1.5", "ema.power": "0.3"}  # fmt: skip


def keys() -> dict[str, Any]:
    """Dotted key -> annotation, of every field of the sections drawn from."""
    hints = typing.get_type_hints(RunConfig)
    return {
        f"{section}.{name}": hint
        for section in SECTIONS
        for name, hint in typing.get_type_hints(hints[section]).items()
        if hint not in (str, bool) and hint != str | None
    }


def command(number: int) -> tuple[list[str], list[str]]:
    """Flags of `ldit train`, and the words of which the message must hold one."""
    drawn = random.Random(number)
    table = keys()
    key = drawn.choice(sorted(table))
    flag = f"--{key}" if drawn.random() < 0.5 else f"--{key.replace('_', '-')}"
    named = [key, f"--{key}", flag.replace("_", "-")]
    way = drawn.random()
    if way < 0.1:  # a flag that does not exist
        place = drawn.randrange(3, len(flag) + 1)
        wrong = flag[:place] + drawn.choice("qzQ7.-") + flag[place:]
        return [wrong, "1"], [wrong]
    if way < 0.15 and typing.get_origin(table[key]) is not tuple:  # a list may be empty
        return [flag], named
    if way < 0.35 and key in LEAST:
        return [flag, str(LEAST[key] - 1 - drawn.choice([0, 1, 10**6]))], named
    if way < 0.35 and key in OUTSIDE:
        return [flag, OUTSIDE[key]], named
    return [flag, _not_a(table[key], drawn)], named


def _not_a(hint: Any, drawn: random.Random) -> str:
    """Text that is no value of this annotation."""
    if int in (hint, *typing.get_args(hint)):
        return drawn.choice(NO_INTEGER)
    if hint is float or float in typing.get_args(hint):
        return drawn.choice(NO_FLOAT)
    return drawn.choice(JUNK)


def document(number: int) -> tuple[Any, str]:
    """The content of a RUN/config.json, and the key that its refusal must name."""
    drawn = random.Random(number)
    data: dict[str, Any] = json.loads(json.dumps(recipe("tiny-cpu").to_json()))
    data["sampling"]["guidance_interval"] = [0.0, 1.0]
    where = drawn.choice(sorted(k for k in data if isinstance(data[k], dict)))
    way = drawn.random()
    if way < 0.1:
        data[where] = drawn.choice([3, "x", [], [1], True, 1.5, *([] if where == "sampling" else [None])])
        return data, where
    if way < 0.2:
        name = drawn.choice(["colour", "", "__class__", "é", "lr ", "a" * 3000, "x\ny", "model.dim"])
        data[where][name] = 1
        return data, where
    if way < 0.22:
        data["format"] = drawn.choice([None, 1, "run-2", [], {}, "RUN-1"])
        return data, "format"
    hints = _hints(where)
    name = drawn.choice(sorted(hints))
    data[where][name] = drawn.choice(_wrong(hints[name]))
    return data, f"{where}.{name}"


def _hints(where: str) -> dict[str, Any]:
    hint = typing.get_type_hints(RunConfig)[where]
    choices = [h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)]
    named = {type(getattr(recipe("tiny-cpu"), where))}
    (chosen,) = [h for h in choices if h in named]
    return typing.get_type_hints(chosen)


def _wrong(hint: Any) -> list[Any]:
    """JSON values that are none of this annotation's."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = typing.get_args(hint) if union else (hint,)
    wrong: list[Any] = [{}, {"a": 1}, [[]], ["x", {}], "\x00", "A" * 3000]
    if type(None) not in options:
        wrong.append(None)
    if bool not in options:
        wrong += [True, False]
    if not {int, float} & set(options):
        wrong += [3, -1]
    if float not in options:
        wrong += [1.5]
    wrong += [float("nan"), float("inf"), float("-inf")]
    if float in options:
        wrong.append(10**400)
    if str in options:
        wrong = [value for value in wrong if not isinstance(value, str)]
    return wrong
