"""The flags of `parallel` do what they say; that they change no loss is `tests/distributed`'s business."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from smallrun import begin, small
from torch.utils._python_dispatch import TorchDispatchMode

from ldit.training.step import train_step

BLOCKS = 3
PER_BLOCK = 7  # wq wk wv wo w1 w2 w3
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Products(TorchDispatchMode):
    """Counts the matrix products that are carried out, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(
        self, op: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.made += op in PRODUCTS
        return op(*args, **(kwargs or {}))


def stepped(**parallel: Any) -> tuple[Counter[int], int]:
    """(passes of each block's feed-forward, matrix products) of one step."""
    values = {"model.n_layers": BLOCKS, **{f"parallel.{key}": value for key, value in parallel.items()}}
    state, task, loader = begin(small(values))
    passes: Counter[int] = Counter()
    for index, block in enumerate(state.weights.model.layers):  # type: ignore[arg-type]
        block.feed_forward.register_forward_pre_hook(lambda *given, index=index: passes.update([index]))
    (batch,) = loader.from_step(0, 1)
    with Products() as products:
        train_step(state, task, batch)
    return passes, products.made


@pytest.mark.parametrize(("recompute", "passes"), [("none", 1), ("selective", 2), ("full", 2)])
def test_recomputed_blocks_are_passed_twice(recompute: str, passes: int) -> None:
    assert stepped(recompute=recompute)[0] == dict.fromkeys(range(BLOCKS), passes)


def test_selective_recomputation_makes_no_product_twice() -> None:
    """Full recomputation makes every one of a block's again."""
    none, selective, full = (stepped(recompute=kind)[1] for kind in ("none", "selective", "full"))
    assert selective == none and full == none + BLOCKS * PER_BLOCK


class Compiler:
    """Stands for torch.compile: what it was given, and the calls of what it gave back."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.called: list[int] = []

    def __call__(self, forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        number = len(self.options)
        self.options.append(options)

        def compiled(*given: Any) -> Any:
            self.called.append(number)
            return forward(*given)

        return compiled


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_block_is_compiled_with_its_recomputation(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself, for one shape; once a step, since what is made again is inside of what was compiled."""
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    passes, _ = stepped(compile=True, recompute=recompute)
    assert compiler.options == [{"dynamic": False}] * BLOCKS and compiler.called == list(range(BLOCKS))
    assert set(passes.values()) == {1 if recompute == "none" else 2}


def test_nothing_is_compiled_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    stepped()
    assert compiler.options == []
