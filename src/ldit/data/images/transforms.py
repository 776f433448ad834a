"""The ADM centre crop (Dhariwal & Nichol 2021)."""

from PIL import Image


def center_crop(image: Image.Image, size: int, height: int | None = None) -> Image.Image:
    """Halve with a box filter while the short side is at least 2·size, resize (bicubic) to short side = size, crop the
    centre. With `height` the same to size x height: halve while both sides are at least twice as long, then resize to
    the smallest size that covers the crop."""
    width, height = size, size if height is None else height
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
