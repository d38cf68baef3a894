"""Publish a model of the zoo, or one trained with this package."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from ..checkpoints import Entry, fetch_checkpoint
from ..files import writable_folder
from .card import Facts
from .classifier import save_classifier
from .results import read_results
from .upload import check_repository, require_token, upload_folder


def push(
    name: str,
    repo_id: str,
    *,
    config: Path | None = None,
    entry: Entry | None = None,
    checkpoint: str | None = None,
    results: Path | None = None,
    dataset: str | None = None,
    license: str | None = None,
    folder: Path | None = None,
    branch: str | None = None,
    private: bool = False,
    offline: bool = False,
) -> str:
    """Write the files of a model and upload them.

    Args:
        name: Name of the zoo entry, timm model or config. It is stated in the commit message.
        repo_id: Repository, as USER/NAME.
        config: OpenMMLab config of a detector or segmentor; None for a classifier, or for the
            config of `entry`.
        entry: Entry of the zoo with this name, if any.
        checkpoint: Path or URL of the weights; None for the released ones.
        results: File with results to add to the model card, see
            :func:`~flash_internimage.hub.read_results`.
        dataset: Id or name of the dataset that `checkpoint` was trained on.
        license: Id of the license on the Hub.
        folder: New or empty folder for the files, which are then not uploaded.
        branch: Branch; None for main.
        private: Make a new repository private.
        offline: Use cached files only.

    Returns:
        URL of the commit, or the path of the folder.

    Raises:
        ValueError: If an argument cannot be used or the checkpoint does not match the model.
            Nothing is uploaded then.
        OSError: If a file cannot be read or written, or the upload fails.
    """
    target = check_repository(repo_id, branch)
    if config is None and entry is not None and entry.task != "classification":
        config = entry.config_path
    if checkpoint is None and dataset is not None:
        raise ValueError(
            "--dataset requires --checkpoint; the dataset of released weights is known"
        )
    if folder is None:
        require_token()
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--folder must be a new or empty folder, got {folder}")
    elif private:
        raise ValueError("--private must be used without --folder, which uploads nothing")
    if checkpoint is not None:
        weights = fetch_checkpoint(checkpoint, offline)
    elif entry is None:
        raise ValueError(f"--checkpoint must be set for {name}, which has no released weights")
    else:
        weights = entry.fetch(offline)
    measured = read_results(results, name, weights.name, checkpoint is None) if results else []
    facts = Facts(results=measured, dataset=dataset, license=license)
    with ExitStack() as stack:
        if folder is None:
            path = Path(stack.enter_context(TemporaryDirectory()))
        else:
            path = folder
            stack.enter_context(writable_folder(folder, "--folder"))
        if config is None:
            released = entry if checkpoint is None else None
            save_classifier(path, name, weights, target, entry=released, facts=facts)
        else:
            from ..openmmlab.cli.config import load_config
            from .openmmlab import save_openmmlab_model

            save_openmmlab_model(
                path, load_config(config), weights, target,
                entry=entry, released=checkpoint is None, facts=facts,
            )  # fmt: skip
        if folder is not None:
            return str(folder)
        return upload_folder(path, target, private=private, message=f"Add {name}")
