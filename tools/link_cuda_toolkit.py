"""Link a folder to the CUDA toolkit that pip installed: python tools/link_cuda_toolkit.py FOLDER.

Compilers expect the folder lib64 and the name libcudart.so, which the packages cuda-toolkit[nvcc]
and cuda-toolkit[cudart] do not have.
"""

import sys
import sysconfig
from pathlib import Path


def link_toolkit(toolkit: Path, folder: Path) -> None:
    """Add the missing names to an installed toolkit, and link a folder to it.

    Raises:
        FileNotFoundError: If the compiler or the runtime library is not installed.
    """
    (library,) = list((toolkit / "lib").glob("libcudart.so.*")) or [toolkit / "lib/libcudart.so.*"]
    for needed in (toolkit / "bin" / "nvcc", library):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} does not exist: install cuda-toolkit[nvcc,cudart]")
    links = {
        toolkit / "lib64": Path("lib"),
        toolkit / "lib" / "libcudart.so": Path(library.name),
        folder: toolkit,
    }
    for link, target in links.items():
        link.unlink(missing_ok=True)
        link.symlink_to(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    installed = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu[0-9]*"))
    try:
        link_toolkit(installed[-1] if installed else Path("nvidia", "cu*"), Path(sys.argv[1]))
    except FileNotFoundError as error:
        sys.exit(str(error))
