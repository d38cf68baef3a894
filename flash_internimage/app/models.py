"""The models that the page offers, loaded on first use."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
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
        load: Function that loads a model.
        kept: Number of models in memory, at least 1.

    Raises:
        ValueError: If there are no sources, or two have the same label.
    """

    def __init__(
        self, sources: list[Source], load: Callable[[Source], Predictor], kept: int = 2
    ) -> None:
        if not sources:
            raise ValueError("sources must not be empty")
        self.sources: Mapping[str, Source] = {source.label: source for source in sources}
        if len(self.sources) < len(sources):
            labels = [source.label for source in sources]
            twice = next(label for label in labels if labels.count(label) > 1)
            raise ValueError(f"MODEL must have a name of its own, got '{twice}' twice")
        self._load = load
        self._kept = kept
        self._loaded: OrderedDict[str, Predictor] = OrderedDict()
        self._lock = Lock()
        self._loading = {label: Lock() for label in self.sources}

    @property
    def labels(self) -> list[str]:
        """Labels of all models."""
        return list(self.sources)

    def get(self, label: str) -> Predictor:
        """Return a model; of several threads that need it, one loads it and the others wait.

        Errors while loading are not kept: the next call tries again.
        """
        with self._loading[label]:
            with self._lock:
                if label in self._loaded:
                    self._loaded.move_to_end(label)
                    return self._loaded[label]
            predictor = self._load(self.sources[label])
            with self._lock:
                self._loaded[label] = predictor
                while len(self._loaded) > self._kept:
                    self._loaded.popitem(last=False)
            return predictor
