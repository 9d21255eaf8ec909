"""The place of the result: what it may be, whether there is room, and how it appears all at once."""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from rgsp_jax.checkpoint.specs import Checkpoint
from rgsp_jax.checkpoint.store import RemotePath
from rgsp_jax.errors import RefusedError


def format_bytes(count: int | float) -> str:
    """Bytes in decimal units with three significant digits, as disks are sold: `1.24 GB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} PB"


def _existing_ancestor(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_output(out: Path | RemotePath | str, inputs: Iterable[Checkpoint | Path | str]) -> list[str]:
    """Why nothing may be written at `out`: something is there, it touches an input, its parent will not have it.

    Args:
        out: the directory to create; an empty directory that exists is accepted.
        inputs: the models that are read, opened or as paths.

    Returns:
        One sentence per problem, none where all is well.
    """
    if isinstance(out, RemotePath):
        return check_remote_output(out, inputs)
    out = Path(out)
    problems = []
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        problems.append(f"the output {out} is already there and is not a directory: choose another name")
    elif out.is_dir() and any(out.iterdir()):
        problems.append(f"the output {out} is already there and not empty: choose another name or remove it")
    real = out.resolve()
    given = (x if isinstance(x, Checkpoint) else Path(x) for x in inputs)
    places = ((x.path, x.root) if isinstance(x, Checkpoint) else (x,) for x in given)
    for source in dict.fromkeys(place for group in places for place in group):
        if isinstance(source, RemotePath):
            continue
        path = source.resolve()
        if real == path or path in real.parents:
            problems.append(f"the output {out} lies inside the input {path}: choose a place outside")
        elif real in path.parents:
            problems.append(f"the input {path} lies inside the output {out}: choose another place")
    parent = real.parent
    if not parent.is_dir():
        what = "is not a directory" if parent.exists() else "does not exist: create it first"
        problems.append(f"the output's parent {parent} {what}")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"the output's parent {parent} is not writable for you")
    return problems


def check_remote_output(out: RemotePath, inputs: Iterable[Checkpoint | Path | str]) -> list[str]:
    """As `check_output`, for an output in a store; what an unfinished merge put there is no problem."""
    problems = []
    try:
        found = out.inform()
        if found is not None and found.get("type") != "directory":
            problems.append(f"the output {out} is already there and is an object: choose another name")
        elif out.list_entries() and not out.beside(f"{out.name}.incomplete").list_entries():
            problems.append(f"the output {out} is already there and not empty: choose another name or remove it")
    except OSError as error:
        problems.append(f"{error.filename or out} cannot be read: {error.strerror or error}")
    for source in inputs:
        path = source.path if isinstance(source, Checkpoint) else source
        if not isinstance(path, RemotePath):
            continue
        if f"{out}/".startswith(f"{path}/"):
            problems.append(f"the output {out} lies inside the input {path}: choose a place outside")
        elif f"{path}/".startswith(f"{out}/"):
            problems.append(f"the input {path} lies inside the output {out}: choose another place")
    return problems


def check_disk(path: Path | str, needed_bytes: int) -> list[str]:
    """One sentence if the file system of `path` (which need not exist) has less free than `needed_bytes`."""
    place = _existing_ancestor(Path(path).absolute())
    free = shutil.disk_usage(place).free
    if free >= needed_bytes:
        return []
    return [
        f"the disk of {place} has {format_bytes(free)} free and {format_bytes(needed_bytes)} are needed: "
        f"free {format_bytes(needed_bytes - free)} or choose another place"
    ]


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries (names, renames) to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(incomplete: Path | str, out: Path | str) -> None:
    """Make a finished directory appear under its final name at once: flush all of it, rename, flush the parent.

    Args:
        incomplete: the finished directory.
        out: its final path on the same file system; absent, or an empty directory.

    Raises:
        RefusedError: something is at `out`, or it lies on another file system; `incomplete` is left as it was.
    """
    incomplete, out = Path(incomplete), Path(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise RefusedError(f"{out} appeared while the model was being written; the result is in {incomplete}")
    for folder, _, names in os.walk(incomplete, topdown=False):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))
    try:
        os.rename(incomplete, out)  # replaces an empty directory, fails on any other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise RefusedError(
                f"{out} appeared while the model was being written; the result is in {incomplete}"
            ) from None
        if error.errno == errno.EXDEV:
            raise RefusedError(
                f"{out} is on another file system than {incomplete}, where the result is: move it"
            ) from None
        raise
    sync_directory(out.absolute().parent)
