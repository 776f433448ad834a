"""The codec of pixel models; tensors <-> images, and grids of images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


class PixelCodec:
    """The codec of models without an autoencoder: latents are the images themselves."""

    factor = 1

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the same, fp32."""
        return images.float()

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) -> the same, fp32."""
        return latents.float()


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] (B, 3, H, W) -> uint8: clamp(127.5·x + 128, 0, 255) truncated, the field's rule for sample sets."""
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)


def from_pil(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size -> (B, 3, H, W) fp32 as in training: value/127.5 - 1."""
    arrays = [np.asarray(image, np.float32).transpose(2, 0, 1) for image in images]
    return torch.from_numpy(np.stack(arrays) / np.float32(127.5) - np.float32(1.0))


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 (B, 3, H, W) -> images."""
    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).cpu().numpy()]


_MOST_CAPTION = 200  # characters that are measured
MOST_LINES = 3
"""Of a caption in a grid."""


def published_grid(images: Tensor, columns: int = 4, padding: int = 2) -> Image.Image:
    """The original's sample.png of (B, 3, H, W): black padding, clamp to [-1, 1], (x+1)/2·255 + 0.5 truncated."""
    array = ((images.float().clamp(-1, 1) + 1) / 2 * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    n, _, height, width = array.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.zeros((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), np.uint8)
    for i, image in enumerate(array.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = (i // columns) * (height + padding) + padding, (i % columns) * (width + padding) + padding
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def labelled_grid(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, padding: int = 6, scale: int = 1
) -> Image.Image:
    """Images on white with a caption below each, of as many lines as the longest needs, at most `MOST_LINES`; sides
    multiplied by `scale`."""
    # The canvas: cells of an image and its caption, with padding around them.
    width, height = (side * scale for side in images[0].size)
    size = max(10, min(14, width // 6))
    font = ImageFont.load_default(size=size)
    wrapped = [_wrapped(caption, width, font) for caption in captions]
    line_height = int(size * 1.25)
    text_height = int(size * 1.6) + line_height * (max(map(len, wrapped), default=1) - 1)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = Image.new(
        "RGB", (columns * (width + padding) + padding, rows * (height + text_height + padding) + padding), "white"
    )
    draw = ImageDraw.Draw(canvas)
    # Paste each image and write its caption below.
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = (
            (i % columns) * (width + padding) + padding,
            (i // columns) * (height + text_height + padding) + padding,
        )
        enlarged = image if scale == 1 else image.resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (left, top))
        for number, line in enumerate(lines):
            place = left + width // 2, top + height + 2 + number * line_height
            draw.text(place, line, fill="black", font=font, anchor="ma")
    return canvas


def _wrapped(caption: str, width: int, font: Any) -> list[str]:
    """A caption in lines of at most `width` pixels, broken between words; what does not fit is cut."""
    lines = [""]
    for word in caption[:_MOST_CAPTION].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1] or len(lines) == MOST_LINES:
            lines[-1] = longer
        else:
            lines.append(word)
    for number, line in enumerate(lines):
        while line and font.getlength(line) > width:
            line = line[:-1]
        lines[number] = line
    return lines
