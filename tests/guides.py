"""Read the examples of the documentation."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def read_examples(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language, in their order."""
    text = (DOCS / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def write_chain(folder: Path, base: str, examples: list[str]) -> Path:
    """Write configs that extend `base`, each extending the previous one instead.

    Args:
        folder: Folder that contains the base config.
        base: Name of the base config, as in the examples.
        examples: Configs that begin with their own name in a comment.

    Returns:
        Path of the last config, which has the settings of all.
    """
    last = base
    for example in examples:
        code = example.replace(f'_base_ = "{base}"', f'_base_ = "{last}"')
        assert code != example or last == base
        last = re.match(r"# ([a-z_]+\.py)", code)[1]
        (folder / last).write_text(code)
    return folder / last
