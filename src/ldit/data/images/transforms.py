"""The ADM centre crop (Dhariwal & Nichol 2021), and a crop at a random place."""

from PIL import Image


def center_crop(image: Image.Image, size: int, height: int | None = None) -> Image.Image:
    """Halve with a box filter while the short side is at least 2·size, resize (bicubic) to short side = size, crop the
    centre. With `height` the same to size x height: halve while both sides are at least twice as long, then resize to
    the smallest size that covers the crop."""
    width, height = size, size if height is None else height
    image = covering(image, width, height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop(image: Image.Image, width: int, height: int, u: float, v: float) -> Image.Image:
    """The same to width x height, cropped at the share (u, v) in [0, 1) of the places that there are."""
    image = covering(image, width, height)
    left, top = int(u * (image.width - width + 1)), int(v * (image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def covering(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image, resized to the smallest size that covers width x height."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
