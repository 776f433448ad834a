"""Class names to class indices."""

from collections.abc import Sequence

from ldit.errors import RequestError


def resolve_label(label: int | str, num_classes: int, names: Sequence[str] | None) -> int:
    """An index as it is; a name exactly, then case-folded, then as a unique prefix. RequestError otherwise."""
    if isinstance(label, int) or label.lstrip("-").isdigit():
        index = int(label)
        if not 0 <= index < num_classes:
            raise RequestError(f"class label {index} is out of range: this model has classes 0 to {num_classes - 1}")
        return index
    if names is None:
        raise RequestError(f"class {label!r}: this model has no class names; use numbers 0 to {num_classes - 1}")
    if label in names:
        return list(names).index(label)
    folded = label.casefold()
    for matches in (
        [i for i, name in enumerate(names) if name.casefold() == folded],
        [i for i, name in enumerate(names) if name.casefold().startswith(folded)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise RequestError(f"class {label!r} is ambiguous: {', '.join(names[i] for i in matches[:6])}")
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    raise RequestError(f"unknown class {label!r} (classes: {shown})")
