"""The prompts of a request, checked; from a list or a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldit.config.model import TextModelConfig
from ldit.config.requests.sampling import Images
from ldit.config.spec import ModelSpec
from ldit.errors import RequestError

MOST_CHARACTERS = 1 << 16
MOST_BYTES = 1 << 26  # of a file of prompts


def is_text_model(spec: ModelSpec) -> bool:
    return isinstance(spec.model, TextModelConfig)


def request_prompts(spec: ModelSpec, request: Images) -> tuple[str, ...] | None:
    """The prompts of a request to a text model, one an image; None for other models. RequestError for prompts to a
    model that takes none, for a text model without prompts, and for what is no prompt."""
    given = [name for name in ("prompts", "prompts_file", "negative_prompts") if getattr(request, name) is not None]
    if not is_text_model(spec):
        if given:
            raise RequestError(f"{given[0]}: this model takes no text (its classes: class_labels)")
        return None
    has_labels = request.class_labels is not None and len(tuple(request.class_labels)) > 0
    if has_labels:
        raise RequestError("class_labels: this model takes prompts, not classes (--prompts TEXT …)")
    if "prompts" in given and "prompts_file" in given:
        raise RequestError("prompts_file: give prompts or a file of them, not both")
    prompts = _listed(request.prompts) if request.prompts_file is None else read_prompts(request.prompts_file)
    if not prompts:
        raise RequestError("name at least one prompt (--prompts TEXT …)")
    return tuple(checked_prompt(prompt) for prompt in prompts)


def negative_prompts(request: Images, count: int) -> tuple[str, ...]:
    """The negative prompts of a request for `count` prompts: none, one, or one each; RequestError otherwise."""
    given = tuple(checked_prompt(prompt, "negative_prompts") for prompt in _listed(request.negative_prompts))
    if len(given) not in (0, 1, count):
        raise RequestError(f"negative_prompts: {len(given)} for {count} prompts; give one, or one each")
    return given


def checked_prompt(prompt: Any, name: str = "prompts") -> str:
    """The prompt without space at its ends; an empty one is the null text of guidance. RequestError for no text."""
    if not isinstance(prompt, str):
        raise RequestError(f"{name}: expected a text, got {prompt!r:.80}")
    if len(prompt) > MOST_CHARACTERS:
        raise RequestError(f"{name}: {len(prompt):,} characters, the most are {MOST_CHARACTERS:,}")
    if "\0" in prompt or any("\ud800" <= c <= "\udfff" for c in prompt):
        raise RequestError(f"{name}: {prompt!r:.80} holds characters that are no text")
    return prompt.strip()


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank. RequestError when it cannot be read."""
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RequestError(f"prompts_file: {path} has more than {MOST_BYTES:,} bytes")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"prompts_file: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RequestError(f"prompts_file: {path}, line {line}: not UTF-8 text") from None
    return [line for line in text.split("\n") if line.strip()]


def _listed(prompts: Any) -> list[Any]:
    if prompts is None:
        return []
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(f"prompts: expected texts, got {prompts!r:.80}")
    return list(prompts)
