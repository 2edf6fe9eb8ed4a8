"""Whether the Hugging Face hub can be reached.

Its libraries repeat a failed request for half a minute before they say that there is no network. We ask once, with a
short limit, and then tell them to read only what they have already downloaded.
"""

from __future__ import annotations

import contextlib
import threading
import time
from functools import lru_cache

SECONDS = 5.0  # longest wait for an answer
REMEMBERED = 60.0  # seconds for which an answer holds


def reachable() -> bool:
    """Whether the hub answers within SECONDS. False without a request where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT, int(time.monotonic() // REMEMBERED))


@lru_cache(maxsize=2)
def _answers(endpoint: str, period: int) -> bool:
    """Whether this address answers. period: a model, its tokenizer and data ask within one, so they wait once."""
    import httpx
    from huggingface_hub import get_session

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError, OSError):
            get_session().head(endpoint, timeout=SECONDS)
            answered.set()

    # A thread, because the request's own limit does not cover the look-up of the hub's name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answered.is_set()


def reason(e: BaseException, name: str) -> str:
    """Why something could not be read from the hub, in one line: the first line of `e` where nothing better is known."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    at: BaseException | None = e
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    said = str(e).strip()
    if any(isinstance(x, errors.GatedRepoError) for x in chain) or "gated repo" in said:
        where = f"{constants.ENDPOINT}/{name}"
        return f"it is gated: accept its terms at {where}, then log in with hf auth login, or set HF_TOKEN"
    if any(isinstance(x, errors.RepositoryNotFoundError) for x in chain):
        return "the hub has none of this name, or it is private: look at the spelling, or log in with hf auth login"
    if (
        any(isinstance(x, errors.LocalEntryNotFoundError | ConnectionError) for x in chain)
        or "couldn't connect" in said
    ):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
        return f"{why}, and no earlier download is kept"
    return said.splitlines()[0] if said else type(e).__name__
