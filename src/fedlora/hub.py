"""Whether the Hugging Face hub can be reached.

Its libraries repeat a failed request for half a minute before they say that there is no network. We ask once, with a
short limit, and then tell them to read only what they have already downloaded.
"""

from __future__ import annotations

SECONDS = 5.0  # longest wait for an answer


def reachable() -> bool:
    """Whether the hub answers within SECONDS. False without a request where HF_HUB_OFFLINE is set."""
    import httpx
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except (httpx.HTTPError, OSError):
        return False
    return True
