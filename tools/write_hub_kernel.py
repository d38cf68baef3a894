"""Write a repository for Hugging Face's kernel hub, with attention by Triton kernels.

    python -m tools.write_hub_kernel FOLDER

The folder has the hub's layout: `build/torch-cuda` is the package, of the kind `torch-noarch`,
which is not compiled. `kernels.get_local_kernel` loads it, and the Hub serves it after an upload.
"""

import argparse
import base64
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME, VERSION = "ops-dcnv4", 0  # the hub reserves version 0 for kernels that are not stable yet
TEMPLATE = ROOT / "tools" / "hub_kernel"
OPERATORS = ROOT / "ops_dcnv4" / "ops_dcnv4"
SOURCES = (
    *(TEMPLATE / name for name in ("__init__.py", "layers.py", "operators.py")),
    *(OPERATORS / name for name in ("triton_kernels.py", "window.py")),
)
# Earlier versions of `kernels` look for the package in a folder of the repository's name.
FORWARDING = '''"""The package, where earlier versions of `kernels` look for it."""

import importlib.util
import sys
from pathlib import Path

_name = __name__.replace(".", "_") + "_package"
_spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[1] / "__init__.py")
_package = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _package
_spec.loader.exec_module(_package)
globals().update({name: getattr(_package, name) for name in _package.__all__})
__all__ = _package.__all__
'''


def package_files() -> dict[str, bytes]:
    """Return the contents of the package's files by path."""
    files = {path.name: path.read_bytes() for path in SOURCES}
    files[f"{NAME.replace('-', '_')}/__init__.py"] = FORWARDING.encode()
    return files


def describe(files: Mapping[str, bytes]) -> dict:
    """Return the metadata of a package, with an identifier that depends on its contents."""
    digests = {path: hashlib.sha256(files[path]) for path in sorted(files)}
    combined = hashlib.sha256(b"".join(digest.digest() for digest in digests.values()))
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_cuda_{combined.hexdigest()[:12]}",
        "version": VERSION,
        "license": "mit",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {
            "algorithm": "sha256",
            "files": {p: base64.b64encode(d.digest()).decode() for p, d in digests.items()},
        },
    }


def write_repository(folder: Path) -> None:
    """Write the repository into a folder that does not exist or is empty.

    Raises:
        ValueError: If the folder exists and is not empty.
        OSError: If it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"FOLDER must be new or empty, got {folder}")
    package = package_files()
    files = {f"build/torch-cuda/{path}": contents for path, contents in package.items()}
    metadata = json.dumps(describe(package), indent=2) + "\n"
    files["build/torch-cuda/metadata.json"] = metadata.encode()
    files["README.md"] = (TEMPLATE / "README.md").read_bytes()
    files["LICENSE"] = (ROOT / "LICENSE").read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for path, contents in files.items():
            complete = Path(temporary, path)
            complete.parent.mkdir(parents=True, exist_ok=True)
            complete.write_bytes(contents)
        for complete in Path(temporary).iterdir():
            complete.replace(folder / complete.name)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser("python -m tools.write_hub_kernel", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")
    folder = parser.parse_args(argv).folder
    try:
        write_repository(folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"wrote {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
