"""Places in object stores (`gs://`, `s3://`, whatever fsspec opens): asked, read by ranges, written and verified.

fsspec and the package of a store are imported when a place in one is named, never otherwise; retries are theirs.
"""

import base64
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint.hashing import hash_file, sample_file
from rgsp_jax.checkpoint.hub import HUB_PREFIX
from rgsp_jax.checkpoint.safetensors_header import describe_failure
from rgsp_jax.errors import RefusedError

LOCATION = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}
OPTIONS: Mapping[str, Mapping[str, Any]] = {"file": {"auto_mkdir": True}, "local": {"auto_mkdir": True}}
"""Of fsspec's file systems, beside what its own configuration says."""
REQUEST_BYTES, REQUESTS = 8 << 20, 4
"""Most bytes of one request, and how many are under way at once for one reader."""
GAP_BYTES = 256 << 10
"""Bytes between two runs that are read along with them rather than asked for apart."""
MARKS = ("generation", "etag", "ETag", "VersionId", "md5Hash", "crc32c", "mtime", "LastModified", "updated", "created")
"""What stores say of an object that is other when the object is replaced."""
MD5 = re.compile(r"^[0-9a-f]{32}$")


@dataclass(frozen=True)
class ObjectIdentity:
    """What must stay the same in an object between reading its header and reading its elements."""

    size: int
    marks: tuple[tuple[str, str], ...]

    def agrees(self, other: "ObjectIdentity") -> bool:
        """Whether no checksum that both have says that their contents differ."""
        ours, theirs = dict(self.marks), dict(other.marks)
        return all(ours[name] == theirs[name] for name in ("md5Hash", "crc32c") if name in ours and name in theirs)

    @property
    def label(self) -> str:
        """The store's own name of this content, its strongest mark: `md5Hash:...`; "" where it has none."""
        for name in ("md5Hash", "crc32c", "ETag", "etag"):
            for mark, value in self.marks:
                if mark == name:
                    return f"{name}:{value}".replace('"', "")
        return ""


class RemotePath:
    """An object, or what begins with its name and a slash, in a store.

    Its methods raise OSError with the place's name where the store fails or denies something.

    Args:
        url: without a slash at its end.
        key: the same as the file system has it.
        system: fsspec's.
    """

    def __init__(self, url: str, key: str, system: Any):
        self.url, self.key, self.system = url, key, system

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __deepcopy__(self, memo: object) -> "RemotePath":
        return self

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, relative: str | Path) -> "RemotePath":
        return RemotePath(f"{self.url}/{relative}", f"{self.key}/{relative}", self.system)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def beside(self, name: str) -> "RemotePath":
        """Another place under the same parent."""
        url, key = (f"{text.rpartition('/')[0]}/{name}" for text in (self.url, self.key))
        return RemotePath(url, key, self.system)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Whatever a store's package raises as an OSError that names the place."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", self.url) from None
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, "the object is there already", self.url) from None
        except Exception as error:
            raise OSError(errno.EIO, f"the store failed ({describe_failure(error)})", self.url) from error

    def inform(self) -> dict[str, Any] | None:
        """What the store says of the place now; None where nothing is there."""
        try:
            with self.asking():
                return dict(self.system.info(self.key))
        except FileNotFoundError:
            return None

    def identify(self) -> ObjectIdentity | None:
        """Size and marks of an object; None where there is none."""
        found = self.inform()
        if found is None or found.get("type") == "directory":
            return None
        marks = tuple((name, str(found[name])) for name in MARKS if found.get(name) is not None)
        return ObjectIdentity(int(found["size"]), marks)

    def list_entries(self) -> list[dict[str, Any]]:
        """What lies directly below, each with `name` (relative), `type` and `size`; empty where nothing does.

        Raises:
            RefusedError: the store lists a name that is no name of a file.
        """
        with self.asking():
            try:
                entries = self.system.ls(self.key, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        found = []
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if str(entry["name"]).rstrip("/") == self.key.rstrip("/") or not name:
                continue  # the empty object that stands for a folder in some stores
            if name in (".", "..") or "\\" in name or "\0" in name:
                raise RefusedError(f"{self} lists {entry['name']!r}, which is not inside it")
            found.append({"name": name, "type": entry.get("type", "file"), "size": int(entry.get("size") or 0)})
        return sorted(found, key=lambda entry: entry["name"])

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, end) of every range, asked for at once; shorter where the store delivers less."""
        with self.asking():
            keys = [self.key] * len(ranges)
            starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
            return [bytes(data) for data in self.system.cat_ranges(keys, starts, ends, on_error="raise")]

    def read_bytes(self) -> bytes:
        """A small object whole."""
        with self.asking():
            return bytes(self.system.cat_file(self.key))

    def write_bytes(self, content: bytes, *, create: bool = False) -> None:
        """Put a small object; with `create` FileExistsError where it is there already."""
        with self.asking():
            self.system.pipe_file(self.key, content, **({"mode": "create"} if create else {}))

    def copy_to(self, target: "RemotePath") -> None:
        """Copy an object within its store, and see that it arrived whole."""
        with self.asking():
            self.system.cp_file(self.key, target.key)
        ours, theirs = self.identify(), target.identify()
        if ours is None or theirs is None or ours.size != theirs.size or not ours.agrees(theirs):
            raise OSError(errno.EIO, f"the store's copy of {self} is not all there", target.url)

    def fetch(self, target: Path) -> None:
        """Copy an object to a local file."""
        with self.asking():
            self.system.get_file(self.key, str(target))

    def remove(self) -> None:
        """Delete an object, or nothing where there is none."""
        try:
            with self.asking():
                self.system.rm_file(self.key)
        except FileNotFoundError:
            pass

    def remove_all(self) -> None:
        """Delete everything below."""
        for entry in self.list_entries():
            inner = self / entry["name"]
            inner.remove_all() if entry["type"] == "directory" else inner.remove()
        if self.inform() is not None:  # file systems with real directories
            with self.asking():
                self.system.rmdir(self.key)


def is_remote(location: object) -> bool:
    """Whether a location names a place in a store: `PROTOCOL://...`, Hugging Face's hub excepted."""
    text = str(location)
    return isinstance(location, RemotePath) or (LOCATION.match(text) is not None and not text.startswith(HUB_PREFIX))


def locate(location: "str | RemotePath") -> RemotePath:
    """The place that a URL names; no request is made.

    Raises:
        RefusedError: the package that opens this store is not installed, or the URL names nothing in it.
    """
    if isinstance(location, RemotePath):
        return location
    match = LOCATION.match(location)
    if match is None:
        raise RefusedError(f"{location} is no URL of a store: write PROTOCOL://...")
    protocol, rest = match[1], location[match.end() :]
    if not rest.strip("/"):
        raise RefusedError(f"{location} names no place in the store: write {protocol}://BUCKET/PATH")
    if {".", ".."} & set(rest.split("/")):
        raise RefusedError(f"{location} has '.' or '..' among its folders, which stores take for names: write it out")
    package = PACKAGES.get(protocol, "fsspec")
    try:
        import fsspec

        options = {"use_listings_cache": False, **OPTIONS.get(protocol, {})}
        system, key = fsspec.core.url_to_fs(location.rstrip("/"), **options)
    except ImportError as error:
        hint = "" if protocol in PACKAGES else f" ({describe_failure(error)})"
        raise RefusedError(
            f"{location} needs {package}, which is not installed: pip install 'rgsp_jax[remote]'{hint}"
        ) from None
    except Exception as error:  # credentials, an unknown protocol, options of fsspec's configuration
        raise RefusedError(f"{location} cannot be opened: {describe_failure(error)}") from None
    return RemotePath(location.rstrip("/"), key.rstrip("/"), system)


def upload(source: Path, target: RemotePath) -> dict[str, Any]:
    """Put a local file into a store and see that it arrived; what is known of the object.

    Compared are the size and the MD5 that the store says it has; where it says none that can be compared, the object
    is read back.

    Raises:
        OSError: the store fails, or holds something else than the file afterwards.
    """
    with target.asking():
        target.system.put_file(str(source), target.key)
    return verify(source, target)


def verify(source: Path, target: RemotePath) -> dict[str, Any]:
    """Size and MD5 of a file that lies in a store as well; OSError where the object is another."""
    with source.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    found = target.inform()
    size = os.stat(source).st_size
    if found is None or int(found["size"]) != size:
        has = "nothing" if found is None else f"{found['size']} bytes"
        raise OSError(errno.EIO, f"the store has {has} after an upload of {size} bytes", target.url)
    if find_md5(found) != md5 and not has_content(target, source):  # S3's ETag is an MD5 in simple cases only
        raise OSError(errno.EIO, "the store has other bytes than were uploaded", target.url)
    return {"size": size, "md5": md5}


def find_md5(info: Mapping[str, Any]) -> str | None:
    """The MD5 (hexadecimal) that a store gives for an object, where it gives one."""
    if isinstance(info.get("md5Hash"), str):
        try:
            return base64.b64decode(info["md5Hash"], validate=True).hex()
        except ValueError:
            return None
    tag = str(info.get("ETag", "")).strip('"')
    return tag if MD5.match(tag) else None


def has_content(target: RemotePath, source: Path) -> bool:
    """Whether an object, read back, is a local file."""
    size, batch = os.stat(source).st_size, REQUEST_BYTES * REQUESTS
    with source.open("rb") as file:
        for begin in range(0, size, batch):
            starts = range(begin, min(begin + batch, size), REQUEST_BYTES)
            ranges = [(start, min(start + REQUEST_BYTES, size)) for start in starts]
            if b"".join(target.read_ranges(ranges)) != file.read(batch):
                return False
    return True


def identify_file(path: Path | RemotePath) -> list[Any]:
    """Plain data that are other when a file or an object is replaced: name, size, time or the store's marks."""
    if isinstance(path, RemotePath):
        identity = path.identify()
        return [path.url, None if identity is None else [identity.size, *identity.marks]]
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def sample_place(path: Path | RemotePath) -> str:
    """As `rgsp_jax.checkpoint.hashing.sample_file`, of an object by what the store says of it."""
    if isinstance(path, RemotePath):
        return hashlib.sha256(json.dumps(identify_file(path)).encode()).hexdigest()
    return sample_file(path)


def hash_place(path: Path | RemotePath) -> str:
    """SHA-256 (hexadecimal) of a file; of an object what the store calls its content, so that it is not read for it."""
    if isinstance(path, RemotePath):
        identity = path.identify()
        return "" if identity is None else identity.label
    return hash_file(path)
