"""Large-DiT: LLaMA blocks with adaLN-zero conditioning, for class and text models, under the original's names."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.config.model import ClassModelConfig, TextModelConfig
from ldit.nn.conditioning import LabelEmbedder, TextCondition, TimestepEmbedder, TrainingInputs
from ldit.nn.layers import Attention, RMSNorm, SwiGLU, Transformer, dropped, gated_add, modulate
from ldit.nn.rope import GridScale, unrotated
from ldit.nn.tokens import TextLayout, patchify, rope_table, split_patches, unpatchify

EMBEDDING_STD = 0.02
AUGMENT_LABELS = 9
"""Numbers that describe how an image was augmented (Karras et al. 2022)."""
_NOTHING = TrainingInputs()
# Names of parameters, whole or of their first part, that begin as zero and as small random numbers.
_ZERO = ("bias", "gate", "adaLN_table")
_EMBEDDERS = ("t_embedder", "y_embedder", "y_tokens", "augment_embedder", "eol_token", "pad_token")


class Block(nn.Module):
    """Attention and SwiGLU, each with RMSNorm, shift, scale and an unbounded gate (Peebles & Xie 2023, adaLN-zero).

    `modulation` (B, 6, D) holds shift, scale and gate of attention, then those of the FFN. The block's
    `adaLN_modulation` computes it from the conditioning vector (None: an adaLN that all blocks share does). It is an
    argument of `forward` so that a sampler can compute it once for all steps.
    """

    def __init__(self, config: ClassModelConfig | TextModelConfig) -> None:
        super().__init__()
        context_dim = config.cap_feat_dim if isinstance(config, TextModelConfig) else None
        self.attention = Attention(config, context_dim)
        self.feed_forward = SwiGLU(config.dim, config.ffn_hidden)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        if context_dim is not None:
            self.attention_y_norm = RMSNorm(context_dim, config.norm_eps)
        self.adaLN_modulation = None if config.shared_adaln else adaln(config.cond_dim, 6 * config.dim)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        modulation: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        values: Tensor | None = None,
        seeds: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, T, D), rope (T, d/2, 2), modulation (B, 6, D), context (B, L, F), mask (B, L) -> (B, T, D).

        `values`: see `Attention`; networks with value residuals return them besides. `seeds` (B,) and `dropout`: see
        `dropped`, for the updates of attention and FFN.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)  # each (B, D)
        if context is not None:
            context = self.attention_y_norm(context)
        update = self.attention(modulate(self.attention_norm(x), shift_a, scale_a), rope, context, mask, values)
        if isinstance(update, tuple):
            update, values = update
        if seeds is not None:
            update = dropped(update, seeds, dropout)
        x = gated_add(x, gate_a, update)
        update = self.feed_forward(modulate(self.ffn_norm(x), shift_m, scale_m))
        if seeds is not None:
            update = dropped(update, seeds + 1, dropout)
        x = gated_add(x, gate_m, update)
        return x if values is None else (x, values)


def adaln(cond_dim: int, width: int) -> nn.Sequential:
    """The layer that computes modulations, `width` numbers in all, from the conditioning vector."""
    return nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, width))


class FinalLayer(nn.Module):
    """LayerNorm without affine parameters, shift and scale, then a projection to the values of a patch."""

    def __init__(self, dim: int, cond_dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = adaln(cond_dim, 2 * dim)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (B, T, D), modulation (B, 2, D) = shift, scale -> (B, T, out)."""
        shift, scale = modulation.unbind(1)  # each (B, D)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class Modulations(NamedTuple):
    """The modulations of a forward pass: (B, 6, D) a block, (B, 2, D) of the final layer and of the second head. Those
    of the blocks may be computed one by one, each just before its block: FSDP2 gathers its weights no earlier."""

    blocks: Iterable[Tensor]
    final: Tensor
    mid: Tensor | None


class DiT(Transformer):
    """The diffusion transformer. `forward` is deterministic: no label dropout, no guidance, no random numbers.

    Class models: `model(x, t, y)` with x (B, C, H, W), t (B,) and integer labels y (B,). Text models:
    `model(x, t, cond)` with a TextCondition and x as above or a list of (C, H_i, W_i); a list gives a list.
    t goes into the sinusoids unchanged: the index 0..999 for DDPM models, native time x time_scale for flow models.
    The output has config.out_channels channels. Height and width may be any multiples of config.side_unit. `grid`
    sets how positions are computed at sizes other than the training size. With `mid` the output of
    the second head (config.mid_layer) is returned besides. `training` holds what a network is given in training alone.

    The tokens' way: class tokens (config.class_tokens) and one token a patch; the blocks; the final layer. With
    config.fine_layers the trunk works on patches of twice the side. Each of its tokens is then split in four, to which
    the embedding of the small patches is added, and the last blocks work on those (DiT at two patch levels).
    """

    def __init__(self, config: ClassModelConfig | TextModelConfig) -> None:
        super().__init__()
        self.config = config
        p, dim, channels = config.patch_size, config.dim, config.in_channels + config.cond_channels
        # Embedders of patches and time, then of the text or the class.
        self.fine_layers = 0 if isinstance(config, TextModelConfig) else config.fine_layers
        self.class_tokens = 0 if isinstance(config, TextModelConfig) else config.class_tokens
        self.trunk_patch = 2 * p if self.fine_layers else p
        self.x_embedder = nn.Linear(channels * self.trunk_patch**2, dim)
        self.t_embedder = TimestepEmbedder(config.cond_dim)
        if isinstance(config, TextModelConfig):
            self.layout = TextLayout(p, config.max_seq_len)
            self.eol_token = nn.Parameter(torch.zeros(dim))
            self.pad_token = nn.Parameter(torch.zeros(dim))
            self.cap_embedder = nn.Sequential(
                nn.LayerNorm(config.cap_feat_dim, eps=1e-5), nn.Linear(config.cap_feat_dim, config.cond_dim)
            )
        else:
            has_null = config.class_dropout_prob > 0
            self.y_embedder = LabelEmbedder(config.num_classes, has_null, config.cond_dim)
            if config.class_tokens:
                self.y_tokens = LabelEmbedder(config.num_classes, has_null, config.class_tokens * dim)
            if config.augment_labels:
                self.augment_embedder = nn.Linear(AUGMENT_LABELS, config.cond_dim, bias=False)
        # The blocks; their adaLN if they share one; between the levels a split and another embedder of patches.
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        if config.shared_adaln:
            self.adaLN_modulation = adaln(config.cond_dim, 6 * dim)
            self.adaLN_table = nn.Parameter(torch.zeros(config.n_layers, 6 * dim))
        if self.fine_layers:
            self.split = nn.Linear(dim, 4 * dim)
            self.fine_embedder = nn.Linear(channels * p * p, dim)
        # The projection back to patches, and a second one after `mid_layer` blocks.
        self.final_layer = FinalLayer(dim, config.cond_dim, p * p * config.out_channels)
        if config.mid_layer:
            self.mid_head = FinalLayer(dim, config.cond_dim, self._mid_patch**2 * config.out_channels)

    @property
    def blocks(self) -> list[Block]:
        """`layers`, as a list."""
        return cast("list[Block]", list(self.layers))

    @property
    def _trunk_layers(self) -> int:
        return self.config.n_layers - self.fine_layers

    @property
    def _mid_patch(self) -> int:
        """Side of the patches on which the second head works."""
        return self.trunk_patch if self.config.mid_layer <= self._trunk_layers else self.config.patch_size

    def condition(self, t: Tensor, cond: Tensor | TextCondition, augmentation: Tensor | None = None) -> Tensor:
        """The conditioning vector (B, min(D, 1024))."""
        if isinstance(cond, TextCondition):
            return self.t_embedder(t) + self.cap_embedder(cond.mean())
        vector: Tensor = self.t_embedder(t) + self.y_embedder(cond)
        if augmentation is None:
            return vector
        return vector + self.augment_embedder(augmentation.to(vector.dtype))

    def adaln_layers(self) -> list[nn.Sequential]:
        """All adaLN layers: that of each block, or the shared one; of the final layer; of the second head."""
        own = [block.adaLN_modulation for block in self.blocks if block.adaLN_modulation is not None]
        shared = [self.adaLN_modulation] if self.config.shared_adaln else []
        heads = [self.final_layer, self.mid_head] if self.config.mid_layer else [self.final_layer]
        return [*own, *shared, *(head.adaLN_modulation for head in heads)]

    def modulations(self, vector: Tensor) -> Modulations:
        """The modulations from the conditioning vector."""
        if self.config.shared_adaln:
            return self.arranged([layer(vector) for layer in self.adaln_layers()])
        final, *mid = (one(vector).unflatten(-1, (2, -1)) for one in self.adaln_layers()[self.config.n_layers :])
        each = (cast(nn.Module, block.adaLN_modulation)(vector).unflatten(-1, (6, -1)) for block in self.blocks)
        return Modulations(each, final, mid[0] if mid else None)

    def arranged(self, rows: Sequence[Tensor]) -> Modulations:
        """The modulations from the outputs of `adaln_layers`, each (B, width)."""
        if self.config.shared_adaln:
            blocks = [rows[0] + own for own in self.adaLN_table.to(rows[0].dtype)]
            rest = rows[1:]
        else:
            blocks, rest = list(rows[: self.config.n_layers]), rows[self.config.n_layers :]
        final, *mid = (row.unflatten(-1, (2, -1)) for row in rest)
        return Modulations([row.unflatten(-1, (6, -1)) for row in blocks], final, mid[0] if mid else None)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        t: Tensor,
        cond: Tensor | TextCondition,
        *,
        grid: GridScale | None = None,
        mid: bool = False,
        training: TrainingInputs | None = None,
    ) -> Tensor | list[Tensor] | tuple[Tensor, Tensor]:
        augmentation = None if training is None else training.augmentation
        modulations = self.modulations(self.condition(t, cond, augmentation))
        return self.compute(x, self.positions(x, grid), self.layers, modulations, cond, mid, training)

    def compute(
        self,
        x: Tensor | Sequence[Tensor],
        rope: Tensor,
        layers: Iterable[nn.Module],
        modulations: Modulations,
        cond: Tensor | TextCondition | None,
        mid: bool = False,
        training: TrainingInputs | None = None,
    ) -> Tensor | list[Tensor] | tuple[Tensor, Tensor]:
        """The rest of the forward pass, once the rotary table and the modulations are computed.

        `layers` are `self.layers`, or blocks with the same call such as those of an inference copy. Only text models
        and those with class tokens need `cond` here.
        """
        tokens = self.embed(x, cond)
        rope, fine_rope = rope.split([tokens.shape[1], rope.shape[-3] - tokens.shape[1]], dim=-3)
        text = (cond.features, cond.mask) if isinstance(cond, TextCondition) else ()
        training = training or _NOTHING
        values: Tensor | None = None
        second: Tensor | None = None
        route: _Route | None = None
        for index, (layer, modulation) in enumerate(zip(layers, modulations.blocks, strict=True)):
            # From the trunk's patches to the small ones, whose first block gives the values of their residuals.
            if self.fine_layers and index == self._trunk_layers:
                tokens, rope, values = self._split(tokens, x), fine_rope, None
            # Token routing: some tokens skip some blocks.
            if training.kept is not None and index == training.routed[0]:
                route = _Route(tokens, training.kept + self.class_tokens, self.class_tokens)
                tokens = route.taken(tokens)
            # The block. Optional arguments are given where they mean something: blocks of the user's may lack them.
            more: dict[str, Any] = {} if values is None else {"values": values}
            if training.seeds is not None:
                more |= {"seeds": training.seeds + 2 * index, "dropout": training.dropout}
            out = layer(tokens, rope if route is None else route.table(rope), modulation, *text, **more)
            tokens, values = out if isinstance(out, tuple) else (out, None)
            if route is not None and index + 1 == training.routed[1]:
                tokens, route = route.restored(tokens), None
            if mid and index + 1 == self.config.mid_layer:
                second = tokens
        out = self.unembed(tokens, self.final_layer, modulations.final, self.config.patch_size, x)
        if not mid:
            return out
        assert second is not None and modulations.mid is not None and isinstance(out, Tensor)
        other = self.unembed(second, self.mid_head, modulations.mid, self._mid_patch, x)
        assert isinstance(other, Tensor)
        return out, other

    def embed(self, x: Tensor | Sequence[Tensor], cond: Tensor | TextCondition | None = None) -> Tensor:
        """Latents to tokens (B, T, D), one a patch; class models may have tokens of the class in front, text models add
        end-of-line and padding tokens."""
        if isinstance(self.config, TextModelConfig):
            return self.layout.pack(x, self.x_embedder, self.eol_token, self.pad_token)
        if not isinstance(x, Tensor):
            raise ValueError("a class model takes one (B, C, H, W) tensor")
        tokens = self.x_embedder(patchify(x, self.trunk_patch)).flatten(1, 2)
        if not self.class_tokens:
            return tokens
        front = self.y_tokens(cond).unflatten(-1, (self.class_tokens, -1))
        return torch.cat([front.to(tokens.dtype), tokens], dim=1)

    def _split(self, tokens: Tensor, x: Tensor | Sequence[Tensor]) -> Tensor:
        """The trunk's tokens split in four each, plus the embedding of the small patches."""
        assert isinstance(x, Tensor)
        front, tokens = tokens[:, : self.class_tokens], tokens[:, self.class_tokens :]
        rows, columns = (side // self.trunk_patch for side in x.shape[-2:])
        tokens = F.gelu(split_patches(self.split(tokens), rows, columns))
        tokens = tokens + self.fine_embedder(patchify(x, self.config.patch_size)).flatten(1, 2)
        return torch.cat([front, tokens], dim=1) if self.class_tokens else tokens

    def positions(self, x: Tensor | Sequence[Tensor], grid: GridScale | None = None) -> Tensor:
        """Rotary table of the tokens of x: (T, head_dim/2, 2), or (B, T, head_dim/2, 2) for a list of several sizes.
        With two patch levels the table of the small patches follows that of the trunk's."""
        config, device = self.config, self.x_embedder.weight.device
        if isinstance(config, TextModelConfig):
            return self.layout.rope(config.rope, x, config.head_dim, config.rope_scaling_factor, device, grid)
        if not isinstance(x, Tensor):
            raise ValueError("a class model takes one (B, C, H, W) tensor")
        tables = []
        for patch in dict.fromkeys((self.trunk_patch, config.patch_size)):
            rows, columns = (side // patch for side in x.shape[-2:])
            scale = grid
            if grid is not None and grid.stride is not None and patch != config.patch_size:
                scale = replace(grid, stride=grid.stride // 2)  # a row of the trunk has half as many columns
            # Tokens of the class have no position: their queries and keys are not rotated.
            tables += [unrotated(self.class_tokens, config.head_dim, device)] * bool(self.class_tokens)
            tables.append(rope_table(config.rope, rows, columns, config.head_dim, device, scale))
        return tables[0] if len(tables) == 1 else torch.cat(tables)

    def unembed(
        self, tokens: Tensor, head: FinalLayer, modulation: Tensor, patch: int, x: Tensor | Sequence[Tensor]
    ) -> Tensor | list[Tensor]:
        """Tokens (B, T, D) -> output of the height and width of x, by a head with its modulation (B, 2, D)."""
        out = head(tokens[:, self.class_tokens :], modulation)
        if isinstance(self.config, TextModelConfig):
            return self.layout.unpack(out, x)
        assert isinstance(x, Tensor)
        rows, columns = (side // patch for side in x.shape[-2:])
        return unpatchify(out.unflatten(1, (rows, columns)), patch)


class _Route:
    """Tokens that go a way of their own: those at `kept` (B, K) and the first `front` ones, out of `tokens`."""

    def __init__(self, tokens: Tensor, kept: Tensor, front: int) -> None:
        first = torch.arange(front, device=kept.device).expand(len(kept), -1)
        self.all, self.places = tokens, torch.cat([first, kept], dim=1)  # (B, front + K)

    def taken(self, tokens: Tensor) -> Tensor:
        return tokens.gather(1, self._index(tokens))

    def table(self, rope: Tensor) -> Tensor:
        """Rows of the rotary table for the tokens on the way, (B, front + K, d/2, 2)."""
        return rope[self.places]

    def restored(self, tokens: Tensor) -> Tensor:
        """All tokens again: those that went this way in their places, the others as they were."""
        return self.all.scatter(1, self._index(tokens), tokens)

    def _index(self, tokens: Tensor) -> Tensor:
        return self.places[:, :, None].expand(-1, -1, tokens.shape[-1])


def init_weights(model: nn.Module, generator: Callable[[str], torch.Generator]) -> None:
    """Initialise every trained parameter in place, see `init_parameter`; `generator(name)` gives its random numbers."""
    for name, p in model.named_parameters():
        if p.requires_grad:  # the position table of the original DiT is fixed
            init_parameter(name, p, generator)


@torch.no_grad()
def init_parameter(name: str, p: Tensor, generator: Callable[[str], torch.Generator]) -> None:
    """Initialise the full parameter `name` in place.

    Its values depend on its name alone, not on the order of parameters or on how they are sharded.

    | parameter                                                              | value            |
    |------------------------------------------------------------------------|------------------|
    | adaLN layers and table, linears of the heads, text gate, every bias    | 0                |
    | t and text embedder weights, label table, class, eol and pad tokens    | normal, std 0.02 |
    | norm weights                                                           | 1                |
    | weights of value residuals                                             | 1/2              |
    | every other matrix (attention, FFN, patch embedders, split)            | Xavier uniform   |

    The original leaves the text embedder's weight at torch's default. The same table serves `OriginalDiT`, whose patch
    convolution counts as a matrix.
    """
    owner = name.split(".")
    if "adaLN_modulation" in owner or owner[0] in ("final_layer", "mid_head") or owner[-1] in _ZERO:
        p.zero_()
    elif owner[0] in _EMBEDDERS or name == "cap_embedder.1.weight":
        p.normal_(0.0, EMBEDDING_STD, generator=generator(name))
    elif owner[-1] == "value_mix":
        p.fill_(0.5)
    elif p.ndim == 1:
        p.fill_(1.0)
    else:
        matrix = p.view(p.shape[0], -1)
        bound = (6.0 / sum(matrix.shape)) ** 0.5
        p.uniform_(-bound, bound, generator=generator(name))
