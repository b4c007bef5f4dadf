"""The one exception that is meant for the user's eyes."""


class UserError(Exception):
    """Something the user can mend: what was wrong, why, and the command or line that mends it.

    The command line prints it without a traceback and exits with 1; in Python it is an ordinary exception.
    """

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        super().__init__(what, why, remedy)
        self.what, self.why, self.remedy = what, why, remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why:    {self.why}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


def nearest(word: str, valid: list[str]) -> str:
    """Name the closest valid word, as a clause to append to a message (empty if nothing is close)."""
    from difflib import get_close_matches

    close = get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
