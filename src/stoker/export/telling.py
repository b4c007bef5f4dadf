"""What libraries say while a model is exported: kept quiet, or told in a line."""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from stoker.errors import trail

_ADVICE = re.compile(r"\x1b\[[0-9;]*m|For more information, run with TORCH_LOGS=\S+")  # and colours
_LONGEST = 300  # characters


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what exporters print, warn and log.

    The model's own words come with it, as exporters run it; they were said before, when it ran by itself.
    """
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def brief(error: BaseException) -> str:
    """What began it, cut to a few lines, and the line of the user's own code that it came through."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    words = " ".join(_ADVICE.sub("", str(chain[-1])).split())
    text = f"{type(chain[-1]).__name__}: {words}".removesuffix(": ")
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    places = [place for link in chain for place in trail(link)[-1:]]
    return f"{text}\n          at {places[-1]}" if places else text
