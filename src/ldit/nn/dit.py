"""Large-DiT: LLaMA blocks with adaLN-zero conditioning, for class and text models, under the original's names."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.config.model import ClassModelConfig, TextModelConfig
from ldit.nn.conditioning import LabelEmbedder, TextCondition, TimestepEmbedder
from ldit.nn.layers import Attention, RMSNorm, SwiGLU, gated_add, modulate
from ldit.nn.rope import GridScale
from ldit.nn.tokens import TextLayout, patchify, rope_table, unpatchify

EMBEDDING_STD = 0.02


class Block(nn.Module):
    """Attention and SwiGLU, each with RMSNorm, shift, scale and an unbounded gate (Peebles & Xie 2023, adaLN-zero).

    `modulation` (B, 6, D) holds shift, scale and gate of attention, then those of the FFN. The block's
    `adaLN_modulation` computes it from the conditioning vector. It is an argument of `forward` so that a sampler can
    compute it once for all steps.
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
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.cond_dim, 6 * config.dim))

    def forward(
        self, x: Tensor, rope: Tensor, modulation: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, T, D), rope (T, d/2, 2), modulation (B, 6, D), context (B, L, F), mask (B, L) -> (B, T, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)  # each (B, D)
        if context is not None:
            context = self.attention_y_norm(context)
        x = gated_add(
            x, gate_a, self.attention(modulate(self.attention_norm(x), shift_a, scale_a), rope, context, mask)
        )
        return gated_add(x, gate_m, self.feed_forward(modulate(self.ffn_norm(x), shift_m, scale_m)))


class FinalLayer(nn.Module):
    """LayerNorm without affine parameters, shift and scale, then a projection to the values of a patch."""

    def __init__(self, dim: int, cond_dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (B, T, D), modulation (B, 2, D) = shift, scale -> (B, T, out)."""
        shift, scale = modulation.unbind(1)  # each (B, D)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer. `forward` is deterministic: no label dropout, no guidance, no random numbers.

    Class models: `model(x, t, y)` with x (B, C, H, W), t (B,) and integer labels y (B,). Text models:
    `model(x, t, cond)` with a TextCondition and x as above or a list of (C, H_i, W_i); a list gives a list.
    t goes into the sinusoids unchanged: the index 0..999 for DDPM models, native time x time_scale for flow models.
    The output has config.out_channels channels. Height and width may be any multiples of the patch size. `grid`
    (class models only) sets how positions are computed at sizes other than the training size.
    """

    def __init__(self, config: ClassModelConfig | TextModelConfig) -> None:
        super().__init__()
        self.config = config
        p = config.patch_size
        # Embedders of patches and time, then of the text or the class.
        self.x_embedder = nn.Linear((config.in_channels + config.cond_channels) * p * p, config.dim)
        self.t_embedder = TimestepEmbedder(config.cond_dim)
        if isinstance(config, TextModelConfig):
            self.layout = TextLayout(p, config.max_seq_len)
            self.eol_token = nn.Parameter(torch.zeros(config.dim))
            self.pad_token = nn.Parameter(torch.zeros(config.dim))
            self.cap_embedder = nn.Sequential(
                nn.LayerNorm(config.cap_feat_dim, eps=1e-5), nn.Linear(config.cap_feat_dim, config.cond_dim)
            )
        else:
            self.y_embedder = LabelEmbedder(config.num_classes, config.class_dropout_prob > 0, config.cond_dim)
        # The blocks, and the projection back to patches.
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config.dim, config.cond_dim, p * p * config.out_channels)

    @property
    def blocks(self) -> list[Block]:
        """`layers`, as a list."""
        return cast("list[Block]", list(self.layers))

    def condition(self, t: Tensor, cond: Tensor | TextCondition) -> Tensor:
        """The conditioning vector (B, min(D, 1024))."""
        if isinstance(cond, TextCondition):
            return self.t_embedder(t) + self.cap_embedder(cond.mean())
        return self.t_embedder(t) + self.y_embedder(cond)

    def modulations(self, vector: Tensor) -> tuple[list[Tensor], Tensor]:
        """From the conditioning vector: one modulation (B, 6, D) a block, and the final layer's (B, 2, D)."""
        blocks = [block.adaLN_modulation(vector).unflatten(-1, (6, -1)) for block in self.blocks]
        return blocks, self.final_layer.adaLN_modulation(vector).unflatten(-1, (2, -1))

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        t: Tensor,
        cond: Tensor | TextCondition,
        *,
        grid: GridScale | None = None,
    ) -> Tensor | list[Tensor]:
        blocks, final = self.modulations(self.condition(t, cond))
        context = cond if isinstance(cond, TextCondition) else None
        return self.compute(x, self.positions(x, grid), self.layers, blocks, final, context)

    def compute(
        self,
        x: Tensor | Sequence[Tensor],
        rope: Tensor,
        layers: Iterable[nn.Module],
        modulations: Sequence[Tensor],
        final: Tensor,
        context: TextCondition | None = None,
    ) -> Tensor | list[Tensor]:
        """The rest of the forward pass, once the rotary table and the modulations are computed.

        `layers` are `self.layers`, or blocks with the same call such as those of an inference copy.
        """
        tokens = self.embed(x)
        text = () if context is None else (context.features, context.mask)
        for layer, modulation in zip(layers, modulations, strict=True):
            tokens = layer(tokens, rope, modulation, *text)
        return self.unembed(tokens, final, x)

    def embed(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Latents to tokens (B, T, D), one a patch; text models add end-of-line and padding tokens."""
        if isinstance(self.config, TextModelConfig):
            return self.layout.pack(x, self.x_embedder, self.eol_token, self.pad_token)
        if not isinstance(x, Tensor):
            raise ValueError("a class model takes one (B, C, H, W) tensor")
        return self.x_embedder(patchify(x, self.config.patch_size)).flatten(1, 2)

    def positions(self, x: Tensor | Sequence[Tensor], grid: GridScale | None = None) -> Tensor:
        """Rotary table of the tokens of x: (T, head_dim/2, 2), or (B, T, head_dim/2, 2) for a list of several sizes."""
        config, device = self.config, self.x_embedder.weight.device
        if isinstance(config, TextModelConfig):
            if grid is not None:
                raise ValueError("grid: positions of text models are not scaled yet")
            return self.layout.rope(config.rope, x, config.head_dim, config.rope_scaling_factor, device)
        if not isinstance(x, Tensor):
            raise ValueError("a class model takes one (B, C, H, W) tensor")
        rows, columns = (side // config.patch_size for side in x.shape[-2:])
        return rope_table(config.rope, rows, columns, config.head_dim, device, grid)

    def unembed(self, tokens: Tensor, final: Tensor, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Tokens (B, T, D) -> output of the height and width of x, by the final layer with its modulation (B, 2, D)."""
        out = self.final_layer(tokens, final)
        if isinstance(self.config, TextModelConfig):
            return self.layout.unpack(out, x)
        assert isinstance(x, Tensor)
        rows, columns = (side // self.config.patch_size for side in x.shape[-2:])
        return unpatchify(out.unflatten(1, (rows, columns)), self.config.patch_size)


def init_weights(model: nn.Module, generator: Callable[[str], torch.Generator]) -> None:
    """Initialise every trained parameter in place, see `init_parameter`; `generator(name)` gives its random numbers."""
    for name, p in model.named_parameters():
        if p.requires_grad:  # the position table of the original DiT is fixed
            init_parameter(name, p, generator)


@torch.no_grad()
def init_parameter(name: str, p: Tensor, generator: Callable[[str], torch.Generator]) -> None:
    """Initialise the full parameter `name` in place.

    Its values depend on its name alone, not on the order of parameters or on how they are sharded.

    | parameter                                                        | value                |
    |------------------------------------------------------------------|----------------------|
    | adaLN linears, final linear, text attention gate, every bias     | 0                    |
    | t and text embedder weights, label table, eol and pad tokens     | normal, std 0.02     |
    | norm weights                                                     | 1                    |
    | every other matrix (attention, FFN, patch embedder)              | Xavier uniform       |

    The original leaves the text embedder's weight at torch's default. The same table serves `OriginalDiT`, whose patch
    convolution counts as a matrix.
    """
    owner = name.split(".")
    if "adaLN_modulation" in owner or name.startswith("final_layer.linear") or owner[-1] in ("bias", "gate"):
        p.zero_()
    elif owner[0] in ("t_embedder", "y_embedder", "eol_token", "pad_token") or name == "cap_embedder.1.weight":
        p.normal_(0.0, EMBEDDING_STD, generator=generator(name))
    elif p.ndim == 1:
        p.fill_(1.0)
    else:
        matrix = p.view(p.shape[0], -1)
        bound = (6.0 / sum(matrix.shape)) ** 0.5
        p.uniform_(-bound, bound, generator=generator(name))
