"""The contract of a distillation method: a frozen dataclass of its own numbers, and the module that is built from it.

A method sees two passes and a batch and returns named parts of its loss. Nothing here names a method or a detector.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import nn

from ..models.losses import LossPart
from .classes import ClassMap
from .passes import Batch, DetectorView, Needs, Pair, Pass

METHODS: dict[str, type[MethodConfig]] = {}
"""Methods by their name; filled by `crosskd_hf.distillation.methods`, open to users."""


class Paper(NamedTuple):
    """Where a method comes from."""

    title: str
    venue: str
    url: str = ""

    def __str__(self) -> str:
        return f"{self.title} ({self.venue}){', ' * bool(self.url)}{self.url}"


def option(default: Any, text: str, source: str = "", least: float | None = None, most: float | None = None) -> Any:
    """An option of a method.

    Args:
        default: None leaves the choice to what was published for a pair of models, see :meth:`MethodConfig.defaults`.
        text: What it is, for `crosskd-hf methods` and the documentation.
        source: Where the default stands.
        least, most: Range of the values that are allowed.
    """
    metadata = {"help": text, "source": source, "least": least, "most": most}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MethodConfig:
    """One method's own numbers. This is what `methods=` takes; a subclass names its `method` and adds its options.

    `str(config)` is how a command line or a YAML file says the same, and :meth:`parse` reads it.

    Args:
        weight: Factor on all terms of the method.
        terms: Factor of single terms by their name, e.g. {"cls": 0.5}; 0 leaves a term out.

    Raises:
        ValueError: A value out of range, or a term that the method doesn't have.
    """

    method: ClassVar[type[Method]]
    published_numbers: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # by the teacher's kind, for the documentation

    weight: float | None = option(1.0, "Factor on the whole method.", least=0)
    terms: dict[str, float] | None = option(None, "Factor of single terms by their name; 0 leaves a term out.")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            _check_value(self.name, entry.name, getattr(self, entry.name), hints[entry.name], entry.metadata)
        unknown = sorted(set(self.terms or {}) - set(self.method.terms))
        if unknown:
            raise ValueError(f"{self.name} has no terms {unknown}; its terms are {', '.join(self.method.terms)}.")

    @property
    def name(self) -> str:
        """The method's name, the first half of its loss keys."""
        return self.method.name

    # ---- From a configuration to numbers ----

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """What was published for this pair, by option.

        An option with the default None that isn't in here can have no effect on the pair; giving it is an error.
        `terms` lists the terms that the pair has.
        """
        return {"terms": dict.fromkeys(self.method.terms, 1.0)}

    def published(self, pair: Pair) -> Any:
        """The same configuration with every None filled in by :meth:`defaults`; terms of weight 0 are left out.

        Raises:
            ValueError: An option was given that can have no effect on this pair.
        """
        known = self.defaults(pair)
        changes: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "terms" or entry.default is not None:
                continue
            if value is None:
                changes[entry.name] = known.get(entry.name)
            elif entry.name not in known:
                raise ValueError(f"{self.name}: {entry.name}={value!r} has no effect on {pair}. Leave it out.")
        return replace(self, terms=self._terms(known["terms"], pair), **changes)

    def _terms(self, known: Mapping[str, float], pair: Pair) -> dict[str, float]:
        useless = [name for name, weight in (self.terms or {}).items() if weight and name not in known]
        if useless:
            raise ValueError(
                f"{self.name}: the terms {useless} don't exist for {pair}, which has {', '.join(known)}. Leave them "
                "out."
            )
        weights = {name: (self.terms or {}).get(name, weight) for name, weight in known.items()}
        if self.weight == 0 or not any(weights.values()):
            raise ValueError(f"{self.name}: every term has the weight 0. Leave the method out.")
        return {name: weight for name, weight in weights.items() if weight}

    def describe(self) -> dict[str, Any]:
        """Every number that counts, fit for JSON; of a configuration that :meth:`published` filled in."""
        return {entry.name: value for entry in fields(self) if (value := getattr(self, entry.name)) is not None}

    # ---- From a string to a configuration and back ----

    def __str__(self) -> str:
        said = [
            f"{name}={spell_value(value)}"
            for entry in fields(self)
            if (given := getattr(self, entry.name)) != entry.default
            for name, value in self._flat(entry.name, given)
        ]
        own = type(self)
        name = self.name if METHODS.get(self.name) is own else f"{own.__module__}:{own.__qualname__}"
        return f"{name}:{','.join(said)}" if said else name

    def _flat(self, name: str, value: Any) -> list[tuple[str, Any]]:
        """An option as words; `terms` are one each, in the method's own order."""
        if not isinstance(value, Mapping):
            return [(name, value)]
        return [(f"{name}.{term}", value[term]) for term in self.method.terms if term in value]

    @staticmethod
    def parse(text: str) -> MethodConfig:
        """Read `name`, `name:option=value,...`, or the same with `my_package.my_module:MyConfig` as the name.

        A term's weight is the option `terms.NAME`. Importing a module runs its code: trust the string.

        Raises:
            ValueError: Unknown name or option, or a value of the wrong kind.
        """
        head, _, rest = text.strip().partition(":")
        if head in METHODS:
            return _build(METHODS[head], rest)
        if "." in head or (rest and "=" not in rest.partition(":")[0]):
            attribute, _, rest = rest.partition(":")
            return _build(_imported(head, attribute), rest)
        raise ValueError(
            f"The method {head!r} is not known: choose from {', '.join(METHODS)}, or give a class of your own as "
            "my_package.my_module:MyConfig."
        )

    @staticmethod
    def parse_all(methods: Iterable[MethodConfig | str] | MethodConfig | str) -> list[MethodConfig]:
        """Configurations, of those and of strings; a single one stands for a list of itself."""
        given = [methods] if isinstance(methods, str | MethodConfig) else methods
        return [MethodConfig.parse(each) if isinstance(each, str) else each for each in given]


def register(values: Iterable[Any]) -> None:
    """Put the configurations among `values` into :data:`METHODS`, by the names of their methods."""
    kinds = [value for value in values if isinstance(value, type) and issubclass(value, MethodConfig)]
    METHODS.update({kind.method.name: kind for kind in kinds})


class Method(nn.Module):
    """One distillation method between one student and one teacher. Trainable adapters are its sub-modules.

    A subclass sets the class attributes and defines :meth:`forward`.

    Args:
        config: Filled in by :meth:`MethodConfig.published`.
        student, teacher: What the two detectors offer. A ValueError says why the pair can't, and what would work.

    Attributes:
        name: First half of the loss keys.
        needs: What both passes must hold; `student_needs` and `teacher_needs` may differ from it.
        terms: Names of the terms that :meth:`forward` may return.
        paper: Its source, for the documentation and the model card.
        families: In words, which detectors it works for.
        classes: Those that are compared, if the method compares classes; set by the constructor.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = frozenset({"features"})
    terms: ClassVar[tuple[str, ...]] = ("features",)
    paper: ClassVar[Paper | None] = None
    families: ClassVar[str] = "all"

    def __init__(self, config: Any, student: DetectorView, teacher: DetectorView):
        super().__init__()
        self.config = config
        self.classes: ClassMap | None = None

    @property
    def student_needs(self) -> Needs:
        """What the student's pass must hold."""
        return self.needs

    @property
    def teacher_needs(self) -> Needs:
        """What the teacher's pass must hold."""
        return self.needs

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """The terms by their name, before the configuration's weights; terms of weight 0 needn't be computed."""
        raise NotImplementedError

    def wants(self, term: str) -> bool:
        """Whether the term counts."""
        return term in self.config.terms

    def prepare_student(self, student: DetectorView, teacher: DetectorView) -> None:
        """Change the student once, before its training begins."""

    def check_length(self, updates: int) -> None:
        """Raises ValueError if the method, or an option of it, can have no effect in a run of so many updates."""

    def unreached(self, student: DetectorView) -> list[nn.Parameter]:
        """Parameters of the student that the gradient of this method must not reach."""
        return []


_KINDS: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _check_value(method: str, name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    choices = get_args(without_none(hint)) if get_origin(without_none(hint)) is Literal else ()
    if value is None:
        return
    if choices and value not in choices:
        raise ValueError(f"{method}: {name}={value!r}: choose one of {', '.join(map(repr, choices))}.")
    kind = without_none(hint)
    if kind in _KINDS and (not isinstance(value, _KINDS[kind]) or isinstance(value, bool) is not (kind is bool)):
        raise ValueError(f"{method}: {name}={value!r} must be {_WORDS[kind]}.")
    least, most = metadata.get("least"), metadata.get("most")
    if (least is not None and not value >= least) or (most is not None and not value <= most):
        bounds = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{method}: {name}={value} must be {bounds}.")


def without_none(hint: Any) -> Any:
    """The kind in `kind | None`."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    rest = [kind for kind in get_args(hint) if kind is not type(None)]
    return rest[0] if len(rest) == 1 else hint


def _build(kind: type[MethodConfig], text: str) -> MethodConfig:
    hints = get_type_hints(kind)
    names = [entry.name for entry in fields(kind)]
    options: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        name, equals, value = (part.strip() for part in word.partition("="))
        name, dot, key = name.partition(".")
        if not equals or name not in names:
            raise ValueError(
                f"{kind.method.name} has no option {word!r}; its options are {', '.join(names)}, given as name=value."
            )
        if dot:
            options.setdefault(name, {})[key] = _read(f"{name}.{key}", value, float)
        else:
            options[name] = _read(name, value, hints[name])
    return kind(**options)


def _read(name: str, text: str, hint: Any) -> Any:
    kind = without_none(hint)
    if text.lower() == "none":
        return None
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{name}={text!r} must be a number ({kind.__name__}).") from None
    if kind is str:
        return text
    raise ValueError(f"{name}={text!r} is not of the kind {getattr(kind, '__name__', kind)}.")


def _imported(module: str, attribute: str) -> type[MethodConfig]:
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The method {module}:{attribute} can't be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, MethodConfig)):
        raise ValueError(f"{module}:{attribute} is no subclass of MethodConfig: name the configuration of the method.")
    return found


def spell_value(value: Any) -> str:
    """A value in as few letters as a person would use: 2 for 2.0, 1e-3 for 0.001."""
    if not isinstance(value, float):
        return str(value)
    plain = f"{value:.12g}" if float(f"{value:.12g}") == value else repr(value)
    digits, _, exponent = f"{value:.12e}".partition("e")
    short = f"{float(digits):g}e{int(exponent)}"
    return short if len(short) < len(plain) and abs(value) < 0.01 and float(short) == value else plain
