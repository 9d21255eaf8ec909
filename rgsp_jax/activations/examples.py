"""Calibration data: texts, images and both together, read as they lie, with every fault named."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rgsp_jax.checkpoint.guards import resolve_inside
from rgsp_jax.checkpoint.safetensors_header import cap, load_json
from rgsp_jax.errors import RefusedError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
ARRAY_NAMES = ("pixel_values", "images")
READABLE = (
    ".jsonl (a JSON object per line), .txt (a text per line), .npz (array images or pixel_values), or a directory"
)
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Example:
    """One input of a model. At least one of `text` and `image` is there."""

    text: str | None = None
    pair: str | None = None
    """What follows the text: the second text of a pair, the answer of a conversation."""
    image: Path | np.ndarray | None = None
    """A file, or an array: bytes [height, width, channels], or floats as the model takes them."""
    label: int | None = None
    """Number of its class, where it was asked for."""


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of their file."""

    name: str
    digest: str
    examples: Sequence[Example]

    @property
    def has_text(self) -> bool:
        return self.examples[0].text is not None

    @property
    def has_images(self) -> bool:
        return self.examples[0].image is not None


def read_examples(
    path: Path | str,
    *,
    field: str = "text",
    pair_field: str | None = None,
    image_field: str = "image",
    label_field: str | None = None,
) -> Dataset:
    """Read calibration data.

    Args:
        path: a `.jsonl` file (texts in `field`, optionally second texts in `pair_field` and, beside the texts or
            instead of them, image files in `image_field`, relative to the file's directory and inside it), a `.txt`
            file with a text per line, an `.npz` file with the array `images` or `pixel_values`, or a directory of
            images. `label_field` names the number of the class in a `.jsonl` file; an `.npz` file has it in the array
            of that name.

    Raises:
        RefusedError: no such data, nothing in it, or examples that cannot be read; each is named by its line.
    """
    path = Path(path).expanduser()
    if label_field is not None and path.suffix not in (".jsonl", ".npz"):
        raise RefusedError(f"the data {path} hold no labels: give a .jsonl file or an .npz file that does")
    if path.is_dir():
        return read_image_directory(path)
    if not path.is_file():
        raise RefusedError(f"the data {path} does not exist")
    if path.suffix == ".jsonl":
        examples = read_json_lines(path, field, pair_field, image_field, label_field)
    elif path.suffix == ".txt":
        examples = [Example(text=line) for _, line in read_lines(path)]
    elif path.suffix == ".npz":
        examples = read_arrays(path, label_field)
    else:
        raise RefusedError(f"the data {path} is of an unknown kind by its name: give {READABLE}")
    if not examples:
        raise RefusedError(f"the data {path} is empty: it needs at least one example")
    files = [path, *dict.fromkeys(example.image for example in examples if isinstance(example.image, Path))]
    return Dataset(path.name, hash_files(files), examples)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of every line that is not blank."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedError(f"the data {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_json_lines(
    path: Path, field: str, pair_field: str | None, image_field: str, label_field: str | None = None
) -> list[Example]:
    """Examples of a .jsonl file; an image field there makes every line need one."""
    records: list[tuple[int, dict[str, Any]]] = []
    problems: list[str] = []
    for number, line in read_lines(path):
        try:
            record = load_json(line.encode(), unique=False)
        except ValueError as error:
            problems.append(f"{path}, line {number}: not valid JSON ({error})")
            continue
        if isinstance(record, dict):
            records.append((number, record))
        else:
            problems.append(f"{path}, line {number}: a {type(record).__name__}, not a JSON object")
    with_images = any(image_field in record for _, record in records)
    with_text = field in records[0][1] if with_images and records else True
    needed = ((field, with_text), (pair_field, pair_field is not None), (image_field, with_images))
    wanted = [name for name, is_needed in needed if name is not None and is_needed]
    examples = []
    for number, record in records:
        wrong = [name for name in wanted if not (isinstance(record.get(name), str) and record[name].strip())]
        if wrong:
            problems += [describe_field(path, number, record, name) for name in wrong]
            continue
        label = None if label_field is None else record.get(label_field)
        if label_field is not None and (not isinstance(label, int) or isinstance(label, bool) or label < 0):
            problems.append(f"{path}, line {number}: {label_field!r} is {label!r}; the number of a class is needed")
            continue
        try:
            image = find_image(path.parent, record[image_field]) if with_images else None
        except RefusedError as error:
            problems += [f"{path}, line {number}: {problem}" for problem in error.problems]
            continue
        text = record[field] if with_text else None
        examples.append(Example(text, record[pair_field] if pair_field else None, image, label))
    if problems:
        raise RefusedError(cap(problems))
    return examples


def describe_field(path: Path, number: int, record: dict[str, Any], name: str) -> str:
    """Why a line's field is no text."""
    if name in record:
        kind = "an empty text" if isinstance(record[name], str) else f"a {type(record[name]).__name__}"
        return f"{path}, line {number}: the field {name!r} holds {kind}, a text is needed"
    there = ", ".join(map(repr, list(record)[:10])) or "nothing"
    return f"{path}, line {number}: no field {name!r}; there is {there} (name one with --field)"


def find_image(directory: Path, name: str) -> Path:
    """An image file that data names, inside the data's own directory."""
    real = resolve_inside(directory, name)
    if not real.is_file():
        raise RefusedError(f"the image {name!r} is not in {directory}")
    return real


def read_arrays(path: Path, label_field: str | None = None) -> list[Example]:
    """Examples of an .npz file: the array `pixel_values` or `images`, [examples, ...]."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in ARRAY_NAMES if name in archive.files]
            if not names:
                there = ", ".join(archive.files[:10]) or "nothing"
                raise RefusedError(f"the data {path} has no array images or pixel_values; there is {there}")
            array = archive[names[0]]
            labels = [None] * len(array) if label_field is None else read_labels(path, archive, label_field, len(array))
    except RefusedError:
        raise
    except Exception as error:  # whatever a damaged archive provokes
        raise RefusedError(
            f"the data {path} cannot be read as NumPy arrays ({type(error).__name__}: {error})"
        ) from None
    if array.ndim not in (3, 4) or not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise RefusedError(
            f"the data {path}: {names[0]} is {array.dtype} {list(array.shape)}; images are bytes "
            "[examples, height, width, channels], or floats as the model takes them"
        )
    if np.issubdtype(array.dtype, np.floating):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
        if bad.size:
            listed = ", ".join(map(str, bad[:10]))
            raise RefusedError(f"the data {path}: {names[0]} holds values that are not finite in examples {listed}")
    return [Example(image=image, label=label) for image, label in zip(array, labels, strict=True)]


def read_labels(path: Path, archive: Any, name: str, count: int) -> list[int]:
    """Numbers of classes, one for each image."""
    if name not in archive.files:
        raise RefusedError(f"the data {path} have no array {name!r}; there is {', '.join(archive.files[:10])}")
    labels = archive[name]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
        raise RefusedError(
            f"the data {path}: {name} is {labels.dtype} {list(labels.shape)}; {count} numbers of classes are needed"
        )
    return labels.tolist()


def read_image_directory(directory: Path) -> Dataset:
    """Every image file below a directory, in the order of their names."""
    names = sorted(
        entry.relative_to(directory).as_posix()
        for entry in directory.rglob("*")
        if entry.suffix.lower() in IMAGE_SUFFIXES
        and not any(p.startswith(".") for p in entry.relative_to(directory).parts)
    )
    if not names:
        raise RefusedError(f"the data {directory} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    problems: list[str] = []
    files: list[Path] = []
    for name in names:
        try:
            files.append(find_image(directory, name))
        except RefusedError as error:
            problems += error.problems
    if problems:
        raise RefusedError(cap(problems))
    return Dataset(directory.name, hash_files(files), [Example(image=file) for file in files])


def hash_files(files: Sequence[Path]) -> str:
    """XXH3 (128 bits, hexadecimal) of the files' bytes, one after the other."""
    state = xxhash.xxh3_128()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                state.update(chunk)
    return state.hexdigest()


def check_images(examples: Sequence[Example]) -> None:
    """Open every image file's header; RefusedError naming those that are no images, or Pillow where it is missing."""
    files = [example.image for example in examples if isinstance(example.image, Path)]
    if not files:
        return
    try:
        from PIL import Image
    except ImportError:
        raise RefusedError(f"{files[0]} is an image file and Pillow is not installed: pip install Pillow") from None
    problems = []
    for file in files:
        try:
            with Image.open(file):
                pass
        except Exception as error:  # whatever a damaged file provokes
            problems.append(f"{file} cannot be read as an image ({type(error).__name__})")
    if problems:
        raise RefusedError(cap(problems))


def load_image(image: Path | np.ndarray) -> Any:
    """A Pillow image in RGB of a file; arrays as they are. RefusedError where the pixels cannot be decoded."""
    if isinstance(image, np.ndarray):
        return image
    from PIL import Image

    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except Exception as error:
        raise RefusedError(f"{image} cannot be decoded ({type(error).__name__}: {error})") from None


def describe_examples(dataset: Dataset) -> str:
    """What a dataset holds, for messages: texts, images, or texts with images."""
    parts = [name for name, there in (("texts", dataset.has_text), ("images", dataset.has_images)) if there]
    return " with ".join(parts)
