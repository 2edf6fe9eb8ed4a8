"""An export on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import StateError


def push(folder: Path, repo: str, private: bool = True) -> str:
    """Upload a folder to the model repository `repo` ("owner/name"), which is made where it is not there; returns its address.

    The token is the one that `hf auth login` has stored, or HF_TOKEN. Raises StateError where the hub refuses or cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Export of fedlora")
    except HFValidationError as e:
        raise StateError(f"push: got the repository {repo!r}, expected OWNER/NAME ({str(e).splitlines()[0]})") from e
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise StateError(
            f"push: the hub did not take {repo!r} ({reason}); log in with `hf auth login` or set HF_TOKEN, and look at the network"
        ) from e
    return str(made)
