"""The models that the page offers, loaded on first use."""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from threading import Lock

from ..inference import Predictor

# Parts of a path in a label, at most; further ones would make it too long to be read.
_MOST_PARTS = 4


@dataclass(frozen=True)
class Source:
    """A model of the page.

    Attributes:
        model: Name in the zoo or in timm, or config.
        checkpoint: Path or URL of its weights; None for the released ones.
    """

    model: str
    checkpoint: str | None = None

    def label(self, parts: int = 1) -> str:
        """Return a name for users of the page, who need not know the folders of this machine.

        Args:
            parts: Number of parts at the end of the paths of the config and checkpoint, at least 1.
        """
        is_config = self.model.endswith((".py", ".yaml", ".yml"))
        name = _end(os.path.splitext(self.model)[0], parts) if is_config else self.model
        if self.checkpoint is None:
            return name
        return f"{name} ({_end(self.checkpoint, parts)})"


def _end(path: str, parts: int) -> str:
    return "/".join(PurePath(path).parts[-parts:])


def unique_labels(sources: Sequence[Source]) -> list[str]:
    """Return the labels of sources, with folders or numbers that tell equal ones apart.

    Raises:
        ValueError: If two sources are equal.
    """
    if len({*sources}) < len(sources):
        twice = next(source for source in sources if sources.count(source) > 1)
        raise ValueError(f"MODEL must be given once, got '{twice.label()}' twice")
    labels = [source.label() for source in sources]
    for parts in range(2, _MOST_PARTS + 1):
        count = Counter(labels)
        labels = [
            source.label(parts) if count[label] > 1 else label
            for source, label in zip(sources, labels, strict=True)
        ]
    for i, label in enumerate(labels):
        number = 1
        while labels[i] in labels[:i]:
            number += 1
            labels[i] = f"{label} {number}"
    return labels


class Models:
    """Models by label; those used last are kept in memory.

    Args:
        sources: Sources of the models, which must differ.
        fetch: Function that downloads the weights of a model if necessary and returns their path.
        load: Function that loads a model with these weights.
        kept: Number of models in memory, at least 1.

    Raises:
        ValueError: If there are no sources, or two are equal.
    """

    def __init__(
        self,
        sources: list[Source],
        fetch: Callable[[Source], Path | None],
        load: Callable[[Source, Path | None], Predictor],
        kept: int = 2,
    ) -> None:
        if not sources:
            raise ValueError("sources must not be empty")
        self._sources = dict(zip(unique_labels(sources), sources, strict=True))
        self._fetch, self._load, self._kept = fetch, load, kept
        self._loaded: OrderedDict[str, Predictor] = OrderedDict()
        self._lock = Lock()

    @property
    def labels(self) -> list[str]:
        """Labels of all models."""
        return list(self._sources)

    @contextmanager
    def use(self, label: str) -> Iterator[Predictor]:
        """Lend a model to one thread at a time, and load it if necessary.

        Other models can be used while the weights are downloaded.

        Args:
            label: Label of the model.
        """
        source, weights = self._sources[label], None
        if label not in self._loaded:
            weights = self._fetch(source)
        with self._lock:
            if label not in self._loaded:
                while len(self._loaded) >= self._kept:
                    self._loaded.popitem(last=False)
                self._loaded[label] = self._load(source, weights)
            self._loaded.move_to_end(label)
            yield self._loaded[label]
