"""The place of an unfinished output, `OUT.incomplete`: what lies in it, who may work in it, what is left of it.

OUT.incomplete/model/            the future output
OUT.incomplete/journal.jsonl     what is done, where the merge is one part
OUT.incomplete/parts.json        how the merge is cut, where it is several,
OUT.incomplete/journal-*.jsonl   and what is done of each
OUT.incomplete/token             drawn by process 0, found by the others where they see the same place
"""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rgsp_jax.checkpoint import check_disk
from rgsp_jax.checkpoint.shard_writer import replace_file
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.journal import NAME as JOURNAL
from rgsp_jax.pipeline.parts import NAME as CUT

MODEL = "model"
"""Folder of the workshop that becomes the output."""
TOKEN = "token"
LOCK_FILE = "lock"
"""Taken where a file system locks files only."""
LOOK_SECONDS = 15.0
"""How long a file that another machine wrote may take to be seen here: NFS keeps what it knows of a directory."""
REPORT_ROOM = 64_000_000
"""Bytes set aside on the disk for reports and companion files."""


def name_workshop(out: Path) -> Path:
    """The directory that holds the unfinished output."""
    return out.with_name(out.name + ".incomplete")


def name_journal(number: int) -> str:
    """The journal of one of several parts."""
    return f"journal-{number + 1:05d}.jsonl"


def was_begun(workshop: Path) -> bool:
    """True where work is noted in a workshop."""
    return (workshop / JOURNAL).exists() or (workshop / CUT).exists()


def clear_finished(out: Path, workshop: Path) -> None:
    """Remove what a process killed right after it published leaves behind, and say that there is nothing to resume."""
    if was_begun(workshop) and not (workshop / MODEL).exists() and out.is_dir() and any(out.iterdir()):
        with lock(workshop):
            shutil.rmtree(workshop)
        raise RefusedError(f"{out} is complete, there is nothing to resume: its merge had finished when it was stopped")


def find_place_problems(out: Path, needed_bytes: int, *, resume: bool) -> list[str]:
    """Why work cannot begin at `out` as things lie: an unfinished merge is there, or too little room."""
    workshop = name_workshop(out)
    if workshop.exists():
        hint = f"{workshop} is left from an earlier merge: finish it with --resume, or delete it"
        return [] if resume else [hint]
    return check_disk(out, needed_bytes + REPORT_ROOM)


def make_workshop(workshop: Path) -> None:
    """Make the directory, or leave the one that is there."""
    try:
        workshop.mkdir(exist_ok=True)
    except OSError as error:
        raise RefusedError(f"{workshop} cannot be made: {error.strerror}") from None


def write_token(workshop: Path) -> str:
    """Leave a number in the workshop that whoever sees the same place can find."""
    token = secrets.token_hex(16)
    replace_file(workshop / TOKEN, token.encode())
    return token


def check_token(workshop: Path, token: str) -> None:
    """RefusedError where this process does not see the workshop that process 0 made."""
    deadline = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            if (workshop / TOKEN).read_text() == token:
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise RefusedError(
                f"{workshop} is not the directory that process 0 works in: all processes must write to one place, so"
                " give an --out on a file system that all machines share"
            )
        time.sleep(0.2)


@contextmanager
def lock(workshop: Path) -> Iterator[None]:
    """Keep other runs out of an unfinished output; the lock goes with the process."""
    descriptor = take_lock(workshop)
    try:
        yield
    finally:
        os.close(descriptor)


def take_lock(workshop: Path) -> int:
    """Descriptor of the locked directory, or of a file in it: NFS locks only what is open for writing."""
    choices = ((workshop, os.O_RDONLY | os.O_DIRECTORY), (workshop / LOCK_FILE, os.O_RDWR | os.O_CREAT))
    denied: OSError | None = None
    for path, flags in choices:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise RefusedError(
                f"{workshop} is being written by another process: wait for it, or choose another --out"
            ) from None
        except OSError as error:
            os.close(descriptor)
            denied = error
    assert denied is not None
    raise denied


def explain_os_error(error: OSError, workshop: object) -> RefusedError:
    """A full disk or a lost mount, in one sentence; what is done so far stays for --resume."""
    where = f" ({error.filename})" if error.filename else ""
    return RefusedError(
        f"{error.strerror or error}{where}; what is done so far is in {workshop}: mend it and use --resume"
    )
