"""Large-DiT: LLaMA blocks with adaLN-zero conditioning, for classes and for text, under the original's names."""

from collections.abc import Callable, Iterable, Sequence

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
    """Attention and SwiGLU, each behind RMSNorm, shift, scale and an unbounded gate (Peebles & Xie 2023, adaLN-zero).

    The block is given its `modulation` (B, 6, D) = shift, scale, gate of attention, then of the FFN; its own
    `adaLN_modulation` makes it from the conditioning vector, and a sampler may make it once for all steps.
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
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)
        if context is not None:
            context = self.attention_y_norm(context)
        x = gated_add(
            x, gate_a, self.attention(modulate(self.attention_norm(x), shift_a, scale_a), rope, context, mask)
        )
        return gated_add(x, gate_m, self.feed_forward(modulate(self.ffn_norm(x), shift_m, scale_m)))


class FinalLayer(nn.Module):
    """LayerNorm without affine, shift and scale, projection to the pixels of a patch."""

    def __init__(self, dim: int, cond_dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (B, T, D), modulation (B, 2, D) = shift, scale -> (B, T, out)."""
        shift, scale = modulation.unbind(1)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer. `forward` is deterministic: no label dropout, no guidance, no random numbers.

    Class models: `model(x, t, y)`, x (B, C, H, W), t (B,), y (B,) integer labels. Text models: `model(x, t, cond)`,
    cond a TextCondition, x a tensor or a list of (C, H_i, W_i); list in, list out. t is given to the sinusoids as it
    is: the index 0..999 for DDPM models, native time x time_scale for flow models. Output: out_channels channels.
    Any height and width that are multiples of the patch; `grid` (class models) says how positions are made there.
    """

    def __init__(self, config: ClassModelConfig | TextModelConfig) -> None:
        super().__init__()
        self.config = config
        p = config.patch_size
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
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config.dim, config.cond_dim, p * p * config.out_channels)

    def condition(self, t: Tensor, cond: Tensor | TextCondition) -> Tensor:
        """The conditioning vector (B, min(D, 1024))."""
        if isinstance(cond, TextCondition):
            return self.t_embedder(t) + self.cap_embedder(cond.mean())
        return self.t_embedder(t) + self.y_embedder(cond)

    def modulations(self, vector: Tensor) -> tuple[list[Tensor], Tensor]:
        """Per block (B, 6, D) and for the final layer (B, 2, D), from the conditioning vector."""
        blocks = [layer.adaLN_modulation(vector).unflatten(-1, (6, -1)) for layer in self.layers]  # type: ignore[operator]
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
        """Embed, blocks, unembed: the output for rotary `rope` and modulations that are there already. `layers` are the
        network's own blocks or others called alike, such as those of an inference copy."""
        tokens = self.embed(x)
        text = () if context is None else (context.features, context.mask)
        for layer, modulation in zip(layers, modulations, strict=True):
            tokens = layer(tokens, rope, modulation, *text)
        return self.unembed(tokens, final, x)

    def embed(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Latents to tokens (B, T, D), a token a patch; text models have end-of-line and padding tokens too."""
        if isinstance(self.config, TextModelConfig):
            return self.layout.pack(x, self.x_embedder, self.eol_token, self.pad_token)
        if not isinstance(x, Tensor):
            raise ValueError("a class model takes one (B, C, H, W) tensor")
        return self.x_embedder(patchify(x, self.config.patch_size)).flatten(1, 2)

    def positions(self, x: Tensor | Sequence[Tensor], grid: GridScale | None = None) -> Tensor:
        """Rotary table (T, head_dim/2, 2) of the tokens of x, or one an image for text models; see `GridScale`."""
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
        """Tokens (B, T, D) to an output of the sizes of x, through the final layer with modulation (B, 2, D)."""
        out = self.final_layer(tokens, final)
        if isinstance(self.config, TextModelConfig):
            return self.layout.unpack(out, x)
        assert isinstance(x, Tensor)
        rows, columns = (side // self.config.patch_size for side in x.shape[-2:])
        return unpatchify(out.unflatten(1, (rows, columns)), self.config.patch_size)


def init_weights(model: nn.Module, generator: Callable[[str], torch.Generator]) -> None:
    """Fill every trained parameter in place, see `init_parameter`; `generator(name)` gives its random numbers."""
    for name, p in model.named_parameters():
        if p.requires_grad:  # the baseline's position table is fixed
            init_parameter(name, p, generator)


@torch.no_grad()
def init_parameter(name: str, p: Tensor, generator: Callable[[str], torch.Generator]) -> None:
    """Fill the whole parameter `name` in place. Its values depend on its name alone, not on the order of filling or on
    who holds which part.

    | parameter                                                        | value                |
    |------------------------------------------------------------------|----------------------|
    | adaLN linears, final linear, text attention gate, every bias     | 0                    |
    | t and text embedder weights, label table, eol and pad tokens     | normal, std 0.02     |
    | norm weights                                                     | 1                    |
    | every other matrix (attention, FFN, patch embedder)              | Xavier uniform       |

    (The original leaves the text embedder's weight at torch's default.) Works for the baseline too, whose patch
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
