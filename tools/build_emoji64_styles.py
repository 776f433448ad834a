"""Build emoji64-styles, the emoji of emoji64 in four styles with captions, from four npm packages.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \\
        @iconify-json/fluent-emoji-flat@1.2.6 emojibase-data@17.0.0
    pip install --no-deps resvg-py==0.5.0
    python tools/build_emoji64_styles.py --packages FOLDER --out src/ldit/assets/emoji64-styles

OUT/3d must hold emoji64 (`tools/build_emoji64.py`), which is not changed. The other styles are drawn beside it: Noto
(Apache-2.0) and Twemoji (CC-BY-4.0) as they come, 64x64 on white; Fluent flat (MIT) drawn from SVG at 256x256 and
reduced by box averaging, with at most 64 colours an image. All names, subgroups and skin tones are those of
emoji-datasource (MIT), the tags those of emojibase (MIT).

Besides, OUT receives metadata.jsonl with two captions an image (style, name and tone; name, tone and tags), and four
lists of images kept from training: heldout.txt, and the three that it is made of:

| list                  | images                                                                                      |
|-----------------------|---------------------------------------------------------------------------------------------|
| heldout_concepts.txt  | the concepts that emoji64 holds out, in all styles                                          |
| heldout_tones.txt     | of some concepts one skin tone, in all styles                                               |
| heldout_styles.txt    | of each style some subgroups, such as all birds, which the other styles have                |

They depend on names alone, through sha256, so a rebuild gives the same lists.
"""

import argparse
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_emoji64 import CLASSES, SIZE, Entry, concept_name, index, key, rank, split_combinations
from PIL import Image

QUALITY = 80  # of Noto and Twemoji: with sharp chroma 35 and 36 dB, at two fifths of the bytes of lossless files
COLOURS = 64  # of an image of Fluent flat: 42 dB, at three fifths of the bytes of all colours
FLAT_SIDE = 256  # flat art is drawn at this size
MOST_TAGS = 5
SUBGROUPS = 4  # subgroups that each style holds out
SUBGROUP_SIZE = range(8, 61)  # how many images they may have
STYLES = ("3d", "flat", "noto", "twemoji")
GOOGLE, TWITTER = "emoji-datasource-google-16.0.0.tgz", "emoji-datasource-twitter-16.0.0.tgz"
FLAT, TAGS = "iconify-json-fluent-emoji-flat-1.2.6.tgz", "emojibase-data-17.0.0.tgz"


@dataclass(frozen=True)
class Emoji:
    """What a picture shows, whatever its style."""

    entry: Entry
    subgroup: str
    tags: tuple[str, ...]

    def captions(self, style: str) -> tuple[str, str]:
        """The caption with the style, and the one with tags."""
        name = self.entry.caption
        return f"{style} {name}", ", ".join((name, *self.tags))


def read_json(archive: Path, member: str) -> Any:
    with tarfile.open(archive) as file:
        content = file.extractfile(f"package/{member}")
        assert content is not None
        return json.load(content)


def emoji_table(packages: Path) -> dict[str, Emoji]:
    """What each picture shows, by the code points of its file name."""
    records = read_json(packages / GOOGLE, "emoji_pretty.json")
    entries = index(records)
    subgroups = {
        (CLASSES[r["category"]], concept_name(r)): r["subcategory"] for r in records if r["category"] in CLASSES
    }
    tags = {key(row["hexcode"]): row.get("tags", ()) for row in read_json(packages / TAGS, "en/data.json")}
    concepts = {(e.label, e.concept): code for code, e in entries.items() if not e.tones}
    table = {}
    for code, entry in entries.items():
        base = concepts[entry.label, entry.concept]
        words = set(entry.concept.replace(",", " ").split())
        own = tuple(tag.lower() for tag in tags.get(base, ()) if tag.lower() not in words)[:MOST_TAGS]
        table[code] = Emoji(entry, subgroups[entry.label, entry.concept], own)
    return table


def on_white(image: Image.Image) -> Image.Image:
    """RGB on a white square of its larger side."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB")


def draw_png(packages: Path, out: Path, archive: str, vendor: str, style: str, table: dict[str, Emoji]) -> list[str]:
    """Write the images of a style that comes as PNG files of 64x64; returns the codes it has."""
    codes = []
    with tarfile.open(packages / archive) as file:
        for member in sorted(file.getmembers(), key=lambda m: m.name):
            code = key(Path(member.name).stem)
            if f"/{vendor}/64/" not in member.name or code not in table:
                continue
            content = file.extractfile(member)
            assert content is not None
            image = on_white(Image.open(io.BytesIO(content.read())).convert("RGBA"))
            assert image.size == (SIZE, SIZE), member.name
            save(image, out, style, code, table, quality=QUALITY, use_sharp_yuv=True)
            codes.append(code)
    return codes


def draw_flat(packages: Path, out: Path, table: dict[str, Emoji]) -> list[str]:
    """Write the images of Fluent flat, which come as the bodies of SVG files; returns the codes it has."""
    import resvg_py

    icons = read_json(packages / FLAT, "icons.json")
    names = {key(code): name for code, name in read_json(packages / FLAT, "chars.json").items()}
    codes = []
    for code, name in sorted(names.items()):
        icon = icons["icons"].get(name)
        if icon is None or code not in table:
            continue
        width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{FLAT_SIDE}" '
            f'height="{FLAT_SIDE}">{icon["body"]}</svg>'
        )
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
        small = on_white(image).resize((SIZE, SIZE), Image.Resampling.BOX)
        small = small.quantize(COLOURS, dither=Image.Dither.NONE).convert("RGB")
        save(small, out, "flat", code, table, lossless=True)
        codes.append(code)
    return codes


def path_of(style: str, code: str, table: dict[str, Emoji]) -> str:
    return f"{style}/{table[code].entry.label}/{code.lower()}.webp"


def save(image: Image.Image, out: Path, style: str, code: str, table: dict[str, Emoji], **options: Any) -> None:
    path = out / path_of(style, code, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, method=6, **options)


def held_subgroups(styles: dict[str, dict[str, Emoji]]) -> dict[str, set[str]]:
    """The subgroups that each style holds out. None is held out by two styles."""
    taken: set[str] = set()
    held = {}
    for style in STYLES:
        sizes: dict[str, int] = {}
        for emoji in styles[style].values():
            sizes[emoji.subgroup] = sizes.get(emoji.subgroup, 0) + 1
        fit = sorted((s for s, n in sizes.items() if n in SUBGROUP_SIZE), key=lambda s: rank("style", style, s))
        held[style] = set([s for s in fit if s not in taken][:SUBGROUPS])
        taken |= held[style]
    return held


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the four packages")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    packages, out = args.packages, args.out

    # The pictures of each style, by path.
    table = emoji_table(packages)
    three_d = {
        f"3d/{row['path']}": table[key(Path(row["path"]).stem)]
        for row in json.loads((out / "3d/captions.json").read_text())
    }
    styles = {"3d": three_d}
    drawn = {
        "flat": draw_flat(packages, out, table),
        "noto": draw_png(packages, out, GOOGLE, "google", "noto", table),
        "twemoji": draw_png(packages, out, TWITTER, "twitter", "twemoji", table),
    }
    for style, codes in drawn.items():
        styles[style] = {path_of(style, code, table): table[code] for code in codes}
    for style, pictures in styles.items():
        size = sum((out / path).stat().st_size for path in pictures)
        print(f"{style}: {len(pictures)} images, {size / 1e6:.2f} MB")

    # Captions.
    rows = []
    for style in STYLES:
        for path, emoji in sorted(styles[style].items()):
            captions = list(dict.fromkeys(emoji.captions(style)))
            rows.append({"file_name": path, "label": emoji.entry.label, "text": captions})
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    write_lines(out / "metadata.jsonl", lines)

    # Held-out lists. The concepts and the cells of concept and tone are those of emoji64.
    own = {path.removeprefix("3d/"): emoji.entry for path, emoji in three_d.items()}
    concepts = {
        (own[path].label, own[path].concept) for path in (out / "3d/heldout.txt").read_text().split("\n") if path
    }
    cells = {own[path] for path in split_combinations(own, concepts)}
    subgroups = held_subgroups(styles)
    lists: dict[str, list[str]] = {"concepts": [], "tones": [], "styles": []}
    for style in STYLES:
        for path, emoji in sorted(styles[style].items()):
            entry = emoji.entry
            if (entry.label, entry.concept) in concepts:
                lists["concepts"].append(path)
            elif entry in cells:
                lists["tones"].append(path)
            elif emoji.subgroup in subgroups[style]:
                lists["styles"].append(path)
    for name, paths in lists.items():
        write_lines(out / f"heldout_{name}.txt", paths)
        print(f"held out by {name}: {len(paths)}")
    write_lines(out / "heldout.txt", sorted(path for paths in lists.values() for path in paths))
    print(f"{len(rows)} images; subgroups held out: { {style: sorted(held) for style, held in subgroups.items()} }")


if __name__ == "__main__":
    main()
