"""The configs that are shipped with the package.

An installation contains them in OpenMMLab's layout, in `flash_internimage/.mim/configs`; a checkout
has them next to the package.
"""

import difflib
import os
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath

_PACKAGE = Path(__file__).parent
_SUFFIXES = (".py", ".yaml")


def configs_root() -> Path:
    """Return the folder that contains `configs` and `model-index.yml`.

    Raises:
        FileNotFoundError: If the installation is incomplete.
    """
    for root in (_PACKAGE / ".mim", _PACKAGE.parent):
        if (root / "model-index.yml").is_file() and (root / "configs").is_dir():
            return root
    raise FileNotFoundError(f"{_PACKAGE / '.mim'} has no configs: reinstall flash-internimage")


@cache
def _files() -> dict[PurePosixPath, Path]:
    folder = configs_root() / "configs"
    files = (file for file in sorted(folder.rglob("*")) if file.suffix in _SUFFIXES)
    return {PurePosixPath(file.relative_to(folder).as_posix()): file for file in files}


def list_configs(pattern: str = "*") -> list[str]:
    """List the shipped configs, without the files in `_base_`.

    Args:
        pattern: Wildcard of names, such as `detection/*` or `*mask_rcnn*`.

    Example::

        list_configs('*upernet*')  # ['segmentation/upernet_flash_internimage_b_512_...py', ...]
    """
    names = (str(name) for name in _files() if "_base_" not in name.parts)
    return [name for name in names if fnmatch(name, pattern)]


def find_config(name: str | os.PathLike) -> Path:
    """Return the path of a config.

    Args:
        name: Path of a config, or name of a shipped one, with or without its folder and suffix. A
            name may have the prefix `flash_internimage::`, as in OpenMMLab's `_base_`.

    Raises:
        FileNotFoundError: If there is neither such a file nor such a shipped config.
        ValueError: If the name is empty or a folder, or the prefix is that of another package.

    Example::

        find_config('my_config.py')
        find_config('mask_rcnn_flash_internimage_t_fpn_1x_coco')
        find_config('flash_internimage::detection/mask_rcnn_flash_internimage_t_fpn_1x_coco.py')
    """
    package, separator, rest = os.fspath(name).rpartition("::")
    if separator and package != _PACKAGE.name:
        raise ValueError(f"config must be a path or begin with {_PACKAGE.name}::, got {name}")
    if not separator and os.path.isfile(name):
        return Path(name)
    wanted = PurePosixPath(rest.replace(os.sep, "/"))
    if not separator and wanted.parts[:1] == ("configs",):  # the path in the repository
        wanted = wanted.relative_to("configs")
    for shipped, file in _files().items():
        if wanted in (shipped, shipped.with_suffix("")):
            return file
        if "_base_" not in shipped.parts and str(wanted) in (shipped.name, shipped.stem):
            return file
    if not rest or (not separator and os.path.isdir(name)):
        raise ValueError(f"config must be a file or the name of a shipped one, got '{name}'")
    stems = {PurePosixPath(shipped).stem for shipped in list_configs()}
    close = difflib.get_close_matches(wanted.stem, stems, n=3)
    hint = f"; similar shipped configs: {', '.join(close)}" if close else ""
    raise FileNotFoundError(f"config not found: {name}{hint}")
