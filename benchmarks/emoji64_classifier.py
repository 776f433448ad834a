"""A small convnet that names the class of a 64x64 emoji, used to judge samples: network, file format, training."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldit.rng import generator

CLASSES = 9
SIDE = 64


class _Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut; `stride` 2 halves the side."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class EmojiClassifier(nn.Module):
    """Residual convnet, 0.6M parameters: x (B, 3, 64, 64) in [-1, 1] -> logits (B, 9)."""

    def __init__(self, classes: int = CLASSES, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(), _Residual(w, w))
        self.body = nn.Sequential(_Residual(w, 2 * w, 2), _Residual(2 * w, 4 * w, 2), _Residual(4 * w, 4 * w, 2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * w, classes)

    def features(self, x: Tensor) -> Tensor:
        """The vector before the last layer, (B, 128)."""
        pooled: Tensor = self.body(self.stem(x.contiguous(memory_format=torch.channels_last))).mean((2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.features(x)))
        return logits


def probabilities(network: EmojiClassifier, images: Tensor, batch: int = 256) -> Tensor:
    """Class probabilities (N, 9) of uint8 images (N, 3, 64, 64), the mean over each image and its mirror image."""
    with torch.inference_mode():
        parts = []
        for part in images.split(batch):
            x = to_input(part)
            parts.append((network(x).softmax(-1) + network(x.flip(-1)).softmax(-1)) / 2)
        return torch.cat(parts)


def to_input(images: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def save_classifier(path: Path, network: EmojiClassifier, metadata: Mapping[str, str]) -> None:
    tensors = {name: value.detach().contiguous().cpu() for name, value in network.state_dict().items()}
    save_file(tensors, path, metadata=dict(metadata))


def load_classifier(path: Path) -> tuple[EmojiClassifier, dict[str, str]]:
    """The network, ready for inference, and the metadata of its file."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    network = EmojiClassifier()
    network.load_state_dict(state)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False), metadata


def balanced_batches(labels: Tensor, batch: int, steps: int, random: torch.Generator) -> Tensor:
    """(steps, batch) image indices: a class by chance, then one of its images by chance."""
    members = [torch.nonzero(labels == c).flatten() for c in range(int(labels.max()) + 1)]
    chosen = torch.randint(len(members), (steps, batch), generator=random)
    place = torch.rand(steps, batch, generator=random)
    sizes = torch.tensor([len(m) for m in members])
    flat = torch.cat(members)
    return flat[sizes.cumsum(0)[chosen] - sizes[chosen] + (place * sizes[chosen]).long()]


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Mirror, shift, scale, turn, colour, blur and noise, each image by itself; x (B, 3, H, W) in [-1, 1].

    Blur and noise stand for what samples have and real images have not.
    """
    b = len(x)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=random)

    angle, scale, squeeze = draw(-0.2, 0.2), draw(0.8, 1.2), draw(0.93, 1.07)
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    rows = [
        torch.stack([mirror * scale * squeeze * angle.cos(), -scale * angle.sin(), draw(-0.12, 0.12)], 1),
        torch.stack([mirror * scale * angle.sin(), scale / squeeze * angle.cos(), draw(-0.12, 0.12)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * draw(0.6, 1.3, 1, 1, 1)
    x = 1 - (1 - x) * draw(0.8, 1.15, 3, 1, 1)  # around white, which the background keeps
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(draw(0, 1, 1, 1, 1) < 0.3, torch.lerp(x, soft, draw(0.3, 1, 1, 1, 1)), x)
    x = x + draw(-0.05, 0.1, 1, 1, 1).clamp(min=0) * torch.randn(x.shape, generator=random)
    return x.clamp(-1, 1)


def mix(x: Tensor, target: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A quarter of the rows gets a rectangle of another image, and its share of that image's label (CutMix)."""
    b, _, height, width = x.shape
    other = torch.randperm(b, generator=random)
    x, target = x.clone(), target.clone()
    source, labels = x.clone(), target.clone()
    side = torch.rand(b, generator=random).sqrt()
    corner = torch.rand(b, 2, generator=random)
    for i in range(b // 4):
        h, w = round(float(side[i]) * height * 0.7), round(float(side[i]) * width * 0.7)
        top, left = int(corner[i, 0] * (height - h)), int(corner[i, 1] * (width - w))
        x[i, :, top : top + h, left : left + w] = source[other[i], :, top : top + h, left : left + w]
        target[i] = torch.lerp(labels[i], labels[other[i]], h * w / (height * width))
    return x, target


def train_classifier(images: Tensor, labels: Tensor, steps: int, batch: int, seed: int) -> EmojiClassifier:
    """uint8 images (N, 3, 64, 64), labels (N,) -> the averaged weights of one run, for inference.

    AdamW, a rising then falling rate; the same numbers on every run of one machine and thread count.
    """
    torch.manual_seed(seed)  # weights and dropout
    network = EmojiClassifier().train()
    average = EmojiClassifier().train()
    average.load_state_dict(network.state_dict())
    for net in (network, average):
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    random = generator(seed, "classifier")
    order = balanced_batches(labels, batch, steps, random)
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    started, total = time.perf_counter(), 0.0
    for step, chosen in enumerate(order):
        target = F.one_hot(labels[chosen], CLASSES).float()
        x, target = mix(augment(to_input(images[chosen]), random), target, random)
        loss = F.cross_entropy(network(x), target, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in pairs:
                if value.is_floating_point():
                    mean.lerp_(value, 1 - decay)
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}: loss {total / 100:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
            total = 0.0
    return average.eval().requires_grad_(False)
