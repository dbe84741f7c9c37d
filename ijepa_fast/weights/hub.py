"""A folder of exported weights to the Hugging Face hub: ``export --push OWNER/NAME``."""

import importlib.util
import re
from pathlib import Path

from ijepa_fast.errors import UsageError, require

__all__ = ["list_folder", "push_folder", "require_hub"]

# a part of huggingface_hub's own rule, which is applied when it uploads
_REPO = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*", re.ASCII)


def require_hub(repo: str, *, token: bool) -> None:
    """Refuses before any work what could not be uploaded.

    Args:
        repo: `OWNER/NAME`.
        token: whether one is needed.

    Raises:
        UsageError: a wrong name, no package, or no token.
    """
    rule = "OWNER/NAME, of letters, digits, '-', '_' and '.'"
    require(_REPO.fullmatch(repo) is not None, "push", rule, repo)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError("push needs huggingface_hub: pip install 'ijepa-fast[hub]'")
    from huggingface_hub import get_token

    if token and not get_token():
        raise UsageError(
            "push must have a token of huggingface.co, got none: type `hf auth login`, or set "
            "HF_TOKEN (--push-dry-run needs none)"
        )


def _upload(folder: Path, repo: str) -> str:
    """What to type: `hf` makes a repository public unless told."""
    return f"hf upload {repo} {folder} --private"


def list_folder(folder: Path, repo: str) -> None:
    """Prints what `push_folder` would upload, and the model card."""
    print(f"{repo} would get:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.stat().st_size:>13,} bytes  {path.name}")
    print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}")
    print(f"the folder stays; to upload it: {_upload(folder, repo)}")


def push_folder(folder: Path, repo: str) -> None:
    """Uploads a folder as one commit. A repository that is not there is made, and is private.

    Raises:
        ConnectionError: it was not uploaded; it says what to type when it can be.
    """
    from huggingface_hub import HfApi

    # httpx's or requests', by version; not all of them are OSError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    hub = HfApi(library_name="ijepa-fast")
    try:
        url = hub.create_repo(repo, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Weights of ijepa-fast")
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(
            f"{repo} must take the upload, got {why}; nothing is lost: {_upload(folder, repo)}"
        ) from error
    print(f"uploaded to {url}")
