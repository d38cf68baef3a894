"""The models that the page offers, loaded on first use."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from threading import Lock

from ..inference import Predictor


@dataclass(frozen=True)
class Source:
    """A model of the page.

    Attributes:
        model: Name in the zoo or in timm, or config.
        checkpoint: Path or URL of its weights; None for the released ones.
    """

    model: str
    checkpoint: str | None = None

    @property
    def label(self) -> str:
        """Name for users of the page, who need not know the folders of this machine."""
        is_config = self.model.endswith((".py", ".yaml", ".yml"))
        name = PurePath(self.model).stem if is_config else self.model
        if self.checkpoint is None:
            return name
        return f"{name} ({PurePath(self.checkpoint).name})"


class Models:
    """Models by label; those used last are kept in memory.

    Args:
        sources: Sources of the models, whose labels must differ.
        fetch: Function that downloads the weights of a model if necessary and returns their path.
        load: Function that loads a model with these weights.
        kept: Number of models in memory, at least 1.

    Raises:
        ValueError: If there are no sources, or two have the same label.
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
        self._sources = {source.label: source for source in sources}
        if len(self._sources) < len(sources):
            labels = [source.label for source in sources]
            twice = next(label for label in labels if labels.count(label) > 1)
            raise ValueError(f"MODEL must have a name of its own, got '{twice}' twice")
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
