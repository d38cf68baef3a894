"""Upload a folder to the Hugging Face Hub."""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card import Target


def check_repository(repo_id: str, branch: str | None = None) -> Target:
    """Return where to publish.

    Args:
        repo_id: Repository, as USER/NAME.
        branch: Branch; None for main.

    Raises:
        ValueError: If the repository or the branch cannot have this name.
    """
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(
            "REPO_ID must be USER/NAME, of letters, digits, '-', '_' and '.' and at most 96 "
            f"characters, got {repo_id!r}"
        )
    if branch is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", branch, re.ASCII):
        raise ValueError(f"--branch must be the name of a branch, got {branch!r}")
    return Target(repo_id, branch)


def require_token() -> str:
    """Return the access token of the Hub.

    Raises:
        ValueError: If there is none, or it contains other characters than tokens do.
    """
    token = get_token()
    if not token:
        raise ValueError(
            "an access token with write permission is required: run `hf auth login` or set "
            "HF_TOKEN, or pass --folder to write the files without uploading them"
        )
    if not re.fullmatch(r"[!-~]+", token):  # An error of the HTTP client would show it.
        raise ValueError("the access token must consist of printable ASCII characters")
    return token


def upload_folder(
    folder: Path, target: Target, *, private: bool = False, message: str = "Add model"
) -> str:
    """Upload all files of a folder in a single commit.

    The repository and the branch are created if they do not exist. Other files that exist in the
    repository are kept.

    Args:
        folder: Folder with files only.
        target: Where to upload to.
        private: Make the repository private if it does not exist.
        message: Commit message.

    Returns:
        URL of the commit.

    Raises:
        OSError: If the upload fails.
        ValueError: If there is no access token, or the repository is public despite `private`.
    """
    token = require_token()
    api = HfApi(token=token, library_name="flash-internimage")
    try:
        # create_commit does not create branches; branch off main first.
        api.create_repo(target.repo_id, private=private or None, exist_ok=True)
        is_private = not private or api.model_info(target.repo_id).private
        if is_private and target.branch:
            api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)
        if is_private:
            files = sorted(path for path in folder.iterdir() if path.is_file())
            commit = api.create_commit(
                target.repo_id,
                [CommitOperationAdd(path.name, path) for path in files],
                commit_message=message,
                revision=target.branch,
            )
            return commit.commit_url
    except Exception as error:  # The clients of the Hub and of its storage raise many types.
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason.replace(token, "***")
        # A chained error would show the token.
        raise OSError(f"upload to {target.repo_id} failed: {reason:.500}") from None
    raise ValueError(
        f"--private cannot be used with {target.repo_id}, which exists and is public; change its "
        "settings on the Hub"
    )
