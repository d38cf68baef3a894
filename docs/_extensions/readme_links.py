"""Check the relative links of the Markdown files that Sphinx does not build, such as README.md."""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

_logger = logging.getLogger(__name__)

_LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")
_PATTERNS = ("*.md", "*/README.md", ".github/**/*.md")


def _check_links(app: Sphinx) -> None:
    root = Path(app.srcdir).parent
    for path in sorted({path for pattern in _PATTERNS for path in root.glob(pattern)}):
        for target in _LINK.findall(path.read_text()):
            if not (path.parent / target).exists():
                _logger.warning("%s: broken link to %s", path.relative_to(root), target)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the check with Sphinx."""
    app.connect("builder-inited", _check_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
