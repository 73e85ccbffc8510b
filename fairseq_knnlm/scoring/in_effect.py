"""The settings in effect and where each comes from: what commands log, and write as JSON."""

from collections.abc import Iterable
from typing import NamedTuple, Optional

from .settings import AUTO, Settings

# Where a setting comes from, and the same in words.
GIVEN, TUNED, DEFAULT = "given", "tuned", "default"
# What a cache that joins the softmax of the language model has not.
_OF_ITS_OWN_DISTRIBUTION = ("cache_lambda", "cache_theta", "cache_metric")
_WORDS = {AUTO: "auto, of the datastore"}


class InEffect(NamedTuple):
    """Settings, and where each comes from.

    settings (Settings): of search, mixture and cache.
    sources (dict of str): for each field of them ``given``, ``tuned``, ``default``, or ``auto``:
        what the datastore records.
    searched (bool): whether there is a datastore. Without one the settings of neighbours mean
        nothing.
    """

    settings: Settings
    sources: dict
    searched: bool = True

    @classmethod
    def of(cls, given: dict, tuned: Optional[dict] = None, searched: bool = True) -> "InEffect":
        """Settings as tuned, else as given, else defaults.

        Args:
            given (dict): fields of ``Settings``.
            tuned (dict): the same, and others, which are left out; None: nothing is to be taken
                from what was tuned.
            searched (bool): whether there is a datastore.
        """
        tuned = {name: tuned[name] for name in Settings._fields if name in (tuned or {})}
        sources = {
            name: TUNED if name in tuned else GIVEN if name in given else DEFAULT
            for name in Settings._fields
        }
        return cls(Settings(**{**given, **tuned}), sources, searched)

    def with_auto(self, settings: Settings) -> "InEffect":
        """The same with *settings*, in which the datastore's temperature is a number."""
        if settings == self.settings:
            return self
        return self._replace(settings=settings, sources={**self.sources, "temperature": AUTO})

    def with_tuned(self, tuned: dict) -> "InEffect":
        """The same with some settings that were tuned, by field."""
        return self._replace(
            settings=self.settings._replace(**tuned),
            sources={**self.sources, **dict.fromkeys(tuned, TUNED)},
        )

    def without_cache(self, alone: dict) -> "InEffect":
        """The same without a continuous cache.

        Args:
            alone (dict): settings that are others without it, by field; from where the rest is.
        """
        names = [name for name in Settings._fields if name.startswith("cache_")]
        defaults = {name: Settings._field_defaults[name] for name in names}
        settings = self.settings._replace(**defaults, **alone)
        return self._replace(
            settings=settings, sources={**self.sources, **dict.fromkeys(names, DEFAULT)}
        )

    def names(self) -> list[str]:
        """The settings that mean something: not those of a cache or an index that is not used."""
        return [name for name in Settings._fields if self._matters(name)]

    def _matters(self, name: str) -> bool:
        joined = self.settings.trime_temperature is not None
        if name == "trime_temperature" or (joined and name in _OF_ITS_OWN_DISTRIBUTION):
            return joined and name == "trime_temperature"
        if name.startswith("cache_"):
            return self.settings.cache_size > 0
        if name == "nprobe" and self.settings.distances == "exhaustive":
            return False
        if name == "skip":
            return self.settings.skip > 0.0
        return self.searched

    def line(self, only: Optional[Iterable[str]] = None) -> str:
        """One line for a person: ``settings: k 1024 (default), lambda 0.25 (given), ...``.

        Args:
            only (iterable of str): fields to name; None: all that mean something.
        """
        names = [name for name in self.names() if only is None or name in only]
        return settings_line(
            (name, self.value_in_words(name), self.sources[name]) for name in names
        )

    def value_in_words(self, name: str) -> str:
        """A setting as it is printed.

        Args:
            name (str): field of ``Settings``.
        """
        value = getattr(self.settings, name)
        if name == "cache_theta" and value is None:
            half = "0.5" if self.settings.cache_metric == "l2" else "1"
            return f"{half} / sqrt(dimension)"
        return f"{value:g}" if isinstance(value, float) else str(value)

    def to_dict(self) -> dict:
        """``value`` and ``source`` of every setting that means something, for JSON."""
        values = self.settings._asdict()
        return {
            name: {"value": values[name], "source": self.sources[name]} for name in self.names()
        }


def settings_line(settings: Iterable[tuple[str, object, str]]) -> str:
    """One line for a person.

    Args:
        settings (iterable of tuple): name, value and source of each.
    """
    parts = [
        f"{name.replace('knn_', '').replace('_', ' ')} {value} ({_WORDS.get(source, source)})"
        for name, value, source in settings
    ]
    return f"settings: {', '.join(parts) or 'none, the language model alone'}"
