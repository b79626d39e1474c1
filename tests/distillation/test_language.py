"""Methods have one language: strings, configurations, command line, YAML, JSON, presets and distillation.json."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from transformers import HfArgumentParser

from crosskd_hf.distillation import METHODS, Distiller, MethodConfig
from crosskd_hf.distillation.method import spell_value, without_none
from crosskd_hf.experiments.presets import PRESETS
from crosskd_hf.training.config import CrossKDConfig
from tests.distillation import detector_zoo

NUMBERS = (0.0, 0.5, 1.0, 2.0, 1e-3, 2.5e-7, 1 / 3, 123456.789, 1e20)


def values(kind: type[MethodConfig], name: str, facts: Any) -> list[Any]:
    """Values of an option that are allowed and not its default."""
    hint = without_none(get_type_hints(kind)[name])
    if name == "terms":
        chosen: list[Any] = [dict.fromkeys(kind.method.terms, number) for number in (0.25, 1e-4)]
        chosen.append({kind.method.terms[-1]: 0.0})
    elif get_origin(hint) is Literal:
        chosen = list(get_args(hint))
    elif hint is bool:
        chosen = [False, True]
    else:
        least, most = facts.get("least"), facts.get("most")
        inside = [n for n in NUMBERS if (least is None or n >= least) and (most is None or n <= most)]
        chosen = [int(n) for n in inside if n == int(n)] if hint is int else inside
    return [value for value in chosen if value != kind.__dataclass_fields__[name].default]


def configurations() -> Iterator[MethodConfig]:
    """For every method each value of each option alone, and all options together."""
    for kind in METHODS.values():
        choices = {entry.name: values(kind, entry.name, entry.metadata) for entry in fields(kind)}
        assert all(choices.values()), choices
        for name, given in choices.items():
            yield from (kind(**{name: value}) for value in given)
        longest = max(map(len, choices.values()))
        endless = {name: itertools.cycle(given) for name, given in choices.items()}
        yield from (kind(**{name: next(given) for name, given in endless.items()}) for _ in range(longest))


CONFIGURATIONS = list(configurations())


def test_every_option_of_every_method_survives_as_a_string() -> None:
    assert len(CONFIGURATIONS) > 200
    for config in CONFIGURATIONS:
        again = MethodConfig.parse(str(config))
        assert again == config
        assert type(again) is type(config)
        assert str(again) == str(config)


def test_options_in_another_order_and_spelling_mean_the_same() -> None:
    for config in CONFIGURATIONS:
        name, _, options = str(config).partition(":")
        spaced = f" {name}:{' , '.join(reversed(options.split(',')))}"
        assert str(MethodConfig.parse(spaced)) == str(config)


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_keep_every_digit(number: float) -> None:
    assert float(spell_value(number)) == number
    assert float(spell_value(-number)) == -number


def test_command_line_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    """All configurations of each method in turn, one of each method at a time."""
    by_method = [[c for c in CONFIGURATIONS if c.name == name] for name in METHODS]
    longest = max(map(len, by_method))
    parser = HfArgumentParser(CrossKDConfig)  # type: ignore[arg-type]
    for number in range(0, longest, 7):
        methods = [each[number % len(each)] for each in by_method]
        words = [str(method) for method in methods]
        fixed = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
        (args,) = parser.parse_args_into_dataclasses([*fixed, "--methods", *words])
        assert args.methods == methods
        saved = json.loads(args.to_json_string())["methods"]
        assert saved == args.to_dict()["methods"] == words
        text = yaml.safe_dump({"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "methods": saved})
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        (again,) = parser.parse_yaml_file(str(tmp_path / "run.yaml"))
        assert again.methods == methods


def test_presets_say_what_they_mean() -> None:
    words = {word for preset in PRESETS.values() if preset.losses is not None for word in preset.losses.methods}
    assert len(words) > 10
    assert [word for word in sorted(words) if str(MethodConfig.parse(word)) != word] == []


@pytest.mark.parametrize("name", sorted(METHODS))
def test_distillation_json_holds_a_configuration(name: str) -> None:
    """Its numbers, given again as options, are the same method; and so are they as a string."""
    distiller = Distiller(detector_zoo.build("gfl"), detector_zoo.build("gfl", 1), [name])
    described = json.loads(json.dumps(distiller.describe()))["methods"][name]
    config = METHODS[name](**described)
    assert config == distiller.named_methods[name].config
    assert MethodConfig.parse(str(config)) == config
    assert config.published(distiller.pair) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": "2"}, "crosskd: cut='2' must be a whole number."),
        ({"cut": 2.5}, "crosskd: cut=2.5 must be a whole number."),
        ({"beta": True}, "crosskd: beta=True must be a number."),
        ({"mask_padding": 1}, "crosskd: mask_padding=1 must be True or False."),
        ({"weight": "1"}, "crosskd: weight='1' must be a number."),
        ({"region": "all"}, "crosskd: region='all': choose one of 'P', 'N', 'P+N'."),
    ],
)
def test_a_value_of_another_kind_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        METHODS["crosskd"](**options)
