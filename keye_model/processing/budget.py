"""How long a prompt may become: what is too long is refused as soon as that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keye_model.processing.patches import Frame, Sample


class TokenBudget:
    """Counts a prompt's tokens while its pictures and videos are prepared, one after another.

    Attributes:
        limit: Most tokens of the prompt; None is no limit.
        used: Tokens counted so far.
        enforced: Whether what does not fit is refused; else it is only counted.
    """

    def __init__(self, limit: int | None = None, *, enforced: bool = True) -> None:
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"max_tokens must be a positive integer or None, got {limit!r}")
        self.limit = limit
        self.used = 0
        self.enforced = enforced

    def take(self, tokens: int, what: str, advice: str = "") -> None:
        """Count ``tokens`` more, those of ``what``; raises as `check`."""
        self.check(tokens, what, advice)
        self.used += tokens

    def check(self, tokens: int, what: str, advice: str = "") -> None:
        """Refuse ``tokens`` more without counting them.

        Raises:
            ValueError: They do not fit.
        """
        if self.enforced and not self.fits(tokens):
            got = f"{self.used} and {tokens} more of" if self.used else f"{tokens} of"
            raise ValueError(
                f"prompt must have at most {self.limit} tokens, got {got} {what}"
                f"{advice and '; '}{advice}"
            )

    def check_frames(
        self, count: int, tokens_of: Callable[[int], int], what: str, key: str
    ) -> None:
        """`check` a video of ``count`` frames, and advise how many of them would fit.

        Args:
            tokens_of: Tokens of the video if so many frames are sampled, an even number.
            key: Of the message item, which sets the number of frames.
        """
        tokens = tokens_of(count)
        if not self.fits(tokens):
            most = next((n for n in range(count - 2, 0, -2) if self.fits(tokens_of(n))), None)
            advice = f"{key}={most} fits" if most else "a lower max_pixels may fit"
            self.check(tokens, f"{what} with {count} frames", advice)

    def share(self, needs: Sequence[int]) -> int | None:
        """Most tokens for the first of several videos that need so many; None is no limit.

        All it needs, or an even part of what those leave that need less.
        """
        if self.limit is None:
            return None
        left = self.limit - self.used
        for place, need in enumerate(sorted(needs)):
            even = left // (len(needs) - place)
            if need > even:
                return min(needs[0], even)
            left -= need
        return needs[0]

    def fits(self, tokens: int) -> bool:
        """Whether ``tokens`` more are within the limit."""
        return self.limit is None or self.used + tokens <= self.limit


@dataclass(frozen=True)
class Fit:
    """What a video must fit into: the prompt it is part of.

    Attributes:
        budget: Of the prompt.
        layout: Sample → the `Frame` of each of its frames, and the seconds between two.
        count_tokens: Frames → tokens of a video of them, marks and times included.
        room: Tokens to which frames are dropped or shrunk; None leaves the video as published.
    """

    budget: TokenBudget
    layout: Callable[[Sample], tuple[tuple[Frame, ...], float]]
    count_tokens: Callable[[Sequence[Frame]], int]
    room: int | None = None

    def tokens(self, sample: Sample) -> int:
        return self.count_tokens(self.layout(sample)[0])

    def most(self, fitting: int | None, published: int, name: str) -> int:
        """How many frames to sample: ``fitting``, the most that fit, or else ``published``.

        Raises:
            ValueError: ``fitting`` is None, as no frame fits, and the budget is enforced.
        """
        if fitting is None and self.budget.enforced:
            raise ValueError(
                f"prompt must have at most {self.budget.limit} tokens, got {self.room} left for "
                f"{name}, which hold none of its frames; a lower max_pixels may fit"
            )
        return published if fitting is None else fitting
