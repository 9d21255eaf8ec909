"""An object store on the local disk that counts what it is asked, and fails where it is told to.

Keys are flat: a `folder` is what begins with its name. The directory of its objects is TOY_STORE in the environment, so
that several processes see one store.
"""

import base64
import hashlib
import os
import re
import time
from pathlib import Path
from typing import ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


class ToyStore(AbstractFileSystem):
    protocol = "toy"
    cachable = False
    requests: ClassVar[list[tuple]] = []
    faults: ClassVar[dict[str, object]] = {}
    """Name of a request -> an exception to raise, or a function of (key, data) that spoils them."""
    tells_md5 = True

    def _path(self, key: str) -> Path:
        return Path(os.environ["TOY_STORE"]) / self._strip_protocol(key).strip("/")

    def _note(self, request: str, key: str, *facts: object) -> None:
        self.requests.append((request, key, *facts))
        fault = self.faults.get(request)
        if isinstance(fault, BaseException):
            raise fault

    def _spoil(self, request: str, key: str, data: bytes) -> bytes:
        fault = self.faults.get(request)
        return fault(key, data) if callable(fault) else data

    def _describe(self, path: Path, key: str) -> dict:
        if path.is_dir():
            return {"name": key, "size": 0, "type": "directory"}
        facts = {"name": key, "size": path.stat().st_size, "type": "file", "generation": str(path.stat().st_mtime_ns)}
        if self.tells_md5:
            facts["md5Hash"] = base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()
        return facts

    def info(self, path, **_):
        self._note("info", path)
        if not self._path(path).exists():
            raise FileNotFoundError(path)
        return self._describe(self._path(path), self._strip_protocol(path))

    def ls(self, path, detail=True, **_):
        self._note("ls", path)
        place, key = self._path(path), self._strip_protocol(path).strip("/")
        if not place.is_dir():
            raise FileNotFoundError(path)
        entries = [self._describe(inner, f"{key}/{inner.name}") for inner in place.iterdir() if not is_partial(inner)]
        return entries if detail else [entry["name"] for entry in entries]

    def cat_file(self, path, start=None, end=None, **_):
        self._note("read", path, start, end)
        if not self._path(path).is_file():
            raise FileNotFoundError(path)
        return self._spoil("read", path, self._path(path).read_bytes()[start:end])

    def get_file(self, rpath, lpath, **_):
        Path(lpath).write_bytes(self.cat_file(rpath))

    def pipe_file(self, path, value, mode="overwrite", **_):
        self._note("write", path, len(value))
        target = self._path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        partial.write_bytes(self._spoil("write", path, value))
        if mode == "create":
            try:
                os.link(partial, target)  # fails where the object is there
            finally:
                partial.unlink()
        else:
            os.replace(partial, target)

    def put_file(self, lpath, rpath, **_):
        time.sleep(float(os.environ.get("TOY_SECONDS", 0)))
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def cp_file(self, path1, path2, **_):
        self._note("copy", path1, path2)
        self.pipe_file(path2, self._path(path1).read_bytes())

    def rm_file(self, path):
        self._note("remove", path)
        target = self._path(path)
        target.unlink()
        root = Path(os.environ["TOY_STORE"])
        for folder in target.parents:  # a folder is what begins with its name, and now nothing may
            if folder == root or any(folder.iterdir()):
                break
            folder.rmdir()


def is_partial(path: Path) -> bool:
    return re.search(r"\.\d+\.partial$", path.name) is not None


fsspec.register_implementation("toy", ToyStore, clobber=True)
