"""The one exception that is meant for the user's eyes, and how other people's exceptions are told to them."""

import traceback
from pathlib import Path
from typing import Any

_SOURCE = str(Path(__file__).parent)
LIBRARIES = (str(Path(traceback.__file__).parent), "site-packages", "dist-packages", "<frozen")

# Where stoker calls the recipe's own model, loss, step, optimizer and metrics.
_BOUNDARIES = {"forward_backward", "score_batch", "build_model", "_live", "outputs", "join", "_get", "_advance"}


class UserError(Exception):
    """Something the user can mend: what was wrong, why, and the command or line that mends it.

    The command line prints it without a traceback and exits with 1; in Python it is an ordinary exception.
    """

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        super().__init__(what, why, remedy)
        self.what, self.why, self.remedy = what, why, remedy

    def __reduce__(self) -> tuple[Any, ...]:  # by position: what BaseException would do loses `why` and `remedy`
        return _user_error, (self.what, self.why, self.remedy)

    def __str__(self) -> str:
        lines = [plain(self.what)]
        if self.why:
            lines.append(f"  why:    {plain(self.why)}")
        if self.remedy:
            lines.append(f"  remedy: {plain(self.remedy)}")
        return "\n".join(lines)


def plain(text: object, keep: str = "\n\t") -> str:
    """Spell what a terminal would obey instead of show, in names out of a stranger's files for example."""
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def _user_error(what: str, why: str, remedy: str) -> UserError:
    return UserError(what, why=why, remedy=remedy)


def nearest(word: str, valid: list[str]) -> str:
    """Name the closest valid word, as a clause to append to a message (empty if nothing is close)."""
    from difflib import get_close_matches

    close = get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def trail(error: BaseException) -> list[str]:
    """Lines of the user's own code that an exception came through, outermost first, as `file:line: code`."""
    return [f"{f.filename}:{f.lineno}: {f.line}" for f in traceback.extract_tb(error.__traceback__) if _is_users(f)]


def _is_users(frame: traceback.FrameSummary) -> bool:
    return not frame.filename.startswith(_SOURCE) and not any(part in frame.filename for part in LIBRARIES)


def told(error: BaseException, doing: str) -> UserError:
    """Message for an exception out of the user's own code."""
    if isinstance(error, SyntaxError) and error.filename:
        return UserError(f"{error.filename}:{error.lineno}: {error.msg}", why=(error.text or "").strip())
    try:
        words = str(error)
    except Exception:  # the class is the user's, and so may be its faults
        words = "(its message cannot be shown)"
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    where = "\n          ".join(trail(error))
    return UserError(f"{doing} raised {type(error).__name__}: {words}{notes}", why=f"at {where}" if where else "")


def recipes_fault(error: BaseException) -> UserError | None:
    """Message for an exception that the recipe's own code raised; None for one that is stoker's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [i for i, frame in enumerate(frames) if frame.filename.startswith(_SOURCE)]
    inner = frames[own[-1] + 1 :] if own else frames
    at_boundary = bool(own and inner) and frames[own[-1]].name in _BOUNDARIES
    if not at_boundary and not any(map(_is_users, inner)):
        return None
    message = told(error, "the recipe")
    return UserError(message.what, why=message.why, remedy="STOKER_TRACEBACK=1 shows the whole traceback")
