"""The one exception for what the user can mend: bad paths, mismatched models, impossible settings."""

from collections.abc import Iterable


class RefusedError(ValueError):
    """Work refused before anything was written. `problems` holds one clear sentence each: what, where, what to do."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class NotFiniteError(RefusedError):
    """Refused because the merge, whose models are sound, holds an infinity or a NaN: other settings may not."""
