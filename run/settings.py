"""How settings are declared, read and shown: one dataclass field is the default, the YAML key, the flag and the help text.

Imports no torch, so that `--help` answers at once."""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path

import yaml

from run.errors import Faults, InputError


def setting(default, text: str, *, choices=None, nargs=None, alias: str = "", const=None, above=None, at_least=None, at_most=None):
    """Field of `Config`: its default, its help text and what values it takes.

    `alias` is a second published spelling; `const` the value of the bare flag; `above`, `at_least` and `at_most` bound a number."""
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return dataclasses.field(
        default=default,
        metadata={"help": text, "choices": choices, "nargs": nargs, "alias": alias, "const": const, "bounds": bounds},
    )


KINDS = {int: "whole number", float: "number", str: "text"}


def _value_type(field: dataclasses.Field) -> type:
    """Type of one value of `field`: `float` for `float`, `float | None` and `tuple[float, ...] | None`."""
    hint = field.type
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def _is_optional(field: dataclasses.Field) -> bool:
    return isinstance(field.type, types.UnionType)


def _is_tuple(field: dataclasses.Field) -> bool:
    return "tuple" in str(field.type)


def _convert(field: dataclasses.Field, value):
    """One value of `field`, from YAML or from the command line's text; ValueError where it does not fit."""
    wanted = _value_type(field)
    if wanted is dict:
        if value is not None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
            raise ValueError(f"{value!r} is not a mapping of names to values")
        return value
    if value is False and "off" in (field.metadata["choices"] or ()):
        return "off"  # as YAML reads it
    if value is None or (isinstance(value, str) and value.lower() == "none" and "none" not in (field.metadata["choices"] or ())):
        if not _is_optional(field):
            raise ValueError("needs a value")
        return None
    if wanted is bool or isinstance(value, bool):
        if wanted is not bool or not isinstance(value, bool):
            hint = "; YAML reads no and off as false: write none" if value is False and _is_optional(field) else ""
            raise ValueError(f"{value!r} is not {'true or false' if wanted is bool else 'a ' + KINDS[wanted]}{hint}")
        return value
    if wanted is int and isinstance(value, float):
        raise ValueError(f"{value!r} is not a whole number")
    try:
        return wanted(value)  # also "5e-4", which YAML 1.1 reads as text
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a {KINDS[wanted]}") from None


def _check(field: dataclasses.Field, value) -> None:
    """ValueError where a value is outside its field's choices or bounds."""
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if choices and value is not None and value not in choices:
        raise ValueError(f"{value!r} is not one of {', '.join(choices)}")
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if not math.isfinite(number):
            raise ValueError(f"{number} is not a finite number")
        if bounds["above"] is not None and number <= bounds["above"]:
            raise ValueError(f"{number} is not above {bounds['above']}")
        if bounds["at_least"] is not None and number < bounds["at_least"]:
            raise ValueError(f"{number} is less than {bounds['at_least']}")
        if bounds["at_most"] is not None and number > bounds["at_most"]:
            raise ValueError(f"{number} is more than {bounds['at_most']}")


def _hint(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _UniqueKeys(yaml.SafeLoader):
    """YAML's loader, refusing a key that is given twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.YAMLError(f"'{twice}' is given twice")
        return super().construct_mapping(node, deep)


def _key_value(text: str) -> tuple[str, object]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form key=value")
    return key, yaml.safe_load(value)


def _flags(name: str, alias: str = "") -> list[str]:
    """Kebab-case first: it is what `--help` shows."""
    return [f"--{name.replace('_', '-')}", *([f"--{alias}"] if alias else [])]


def _normalise(argv: list[str]) -> list[str]:
    """Published commands mix `-` and `_` inside flags; values stay as they are."""
    return [arg if not arg.startswith("--") else arg.partition("=")[0].replace("_", "-") + "".join(arg.partition("=")[1:]) for arg in argv]


class Settings:
    """The settings that a frozen dataclass declares with `setting`: read from YAML files and command lines, shown by `--help`, written again.

    `groups` maps titles of `--help`'s sections to their first field; `without_effect` lists published flags that have nothing left to
    decide: number of values, and why."""

    def __init__(self, declared: type, *, prog: str, description: str, groups: dict[str, str], without_effect: dict[str, tuple[int, str]] | None = None):
        self.fields = {field.name: field for field in dataclasses.fields(declared)}
        self.aliases = {field.metadata["alias"]: name for name, field in self.fields.items() if field.metadata["alias"]}
        self.prog, self.description = prog, description
        self.groups, self.without_effect = groups, without_effect or {}

    def value(self, name: str, value, *, where: str):
        """Checked value of the field `name`; InputError naming `where` it came from."""
        field = self.fields[name]
        try:
            if _is_tuple(field) and isinstance(value, list | tuple):
                value = tuple(_convert(field, item) for item in value)
            elif _is_tuple(field) and value is not None:
                value = (_convert(field, value),)
            else:
                value = _convert(field, value)
            _check(field, value)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        return value

    def load(self, path: str) -> dict:
        """Settings of a YAML file, by field name; InputError on an unknown key or a value that does not fit."""
        try:
            recipe = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys) or {}
        except OSError as error:
            raise InputError(f"--config {path}: {error.strerror}; name a YAML file such as recipes/demo.yaml") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"--config {path} is not YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise InputError(f"--config {path} holds no settings: write one 'key: value' per line")
        settings, faults = {}, Faults()
        for key, value in recipe.items():
            name = self.aliases.get(key, str(key).replace("-", "_"))
            with faults.looking():
                if name not in self.fields:
                    raise InputError(f"{path}: unknown setting '{key}'{_hint(name, self.fields)}")
                if name in settings:
                    raise InputError(f"{path}: setting '{key}' is given twice")
                settings[name] = self.value(name, value, where=f"{path}: {key}")
        faults.refuse()
        return settings

    def _formatter(self, prog: str) -> argparse.HelpFormatter:
        fields = self.fields

        class Formatter(argparse.HelpFormatter):
            """Adds the default to each setting's help, unless that tells what nothing stands for."""

            def _get_help_string(self, action: argparse.Action) -> str:
                if action.dest not in fields:
                    return action.help
                default = fields[action.dest].default
                if default is None:
                    return action.help if "default" in action.help else f"{action.help} [none]"
                said = " ".join(map(str, default)) if isinstance(default, tuple) else default
                return f"{action.help} [{said}]".replace("%", "%%")

        return Formatter(prog, max_help_position=32, width=120)

    def build_parser(self) -> argparse.ArgumentParser:
        """Command-line parser of every field; flags absent from the command line are absent from its result."""
        parser = argparse.ArgumentParser(
            prog=self.prog, description=self.description, allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=self._formatter
        )
        parser.add_argument("--config", metavar="YAML", help="recipe: a YAML file of settings, such as recipes/demo.yaml")
        starts = {first: title for title, first in self.groups.items()}
        group = parser
        for name, field in self.fields.items():
            if name in starts:
                group = parser.add_argument_group(starts[name])
            meta, wanted = field.metadata, _value_type(field)
            flags = _flags(name, meta["alias"])
            if wanted is bool:
                group.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, help=meta["help"])
                continue
            metavar = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else {str: "X", dict: "K=V"}.get(wanted, wanted.__name__.upper())
            value_type, action = (_key_value, "extend") if wanted is dict else (str, "store")
            extra = {"const": meta["const"]} if meta["const"] else {}
            group.add_argument(*flags, dest=name, action=action, type=value_type, nargs=meta["nargs"], metavar=metavar, help=meta["help"], **extra)
        for name, (num_values, reason) in self.without_effect.items():
            kwargs = {"action": "store_true"} if num_values == 0 else {"metavar": "X"}
            parser.add_argument(*_flags(name), dest=name, help=f"accepted, without effect: {reason}", **kwargs)
        return parser

    def parse(self, argv: list[str]) -> tuple[dict, list[str]]:
        """Settings that a command line (without the program's name) and its `--config` file give, by field name, and notes for the user.

        Raises InputError on whatever is unknown or does not fit."""
        parser = self.build_parser()
        parser.exit_on_error = False
        try:
            given, unknown = parser.parse_known_args(_normalise(argv))
        except argparse.ArgumentError as error:
            raise InputError(str(error)) from error
        faults, given = Faults(), vars(given)
        known = [flag for action in parser._actions for flag in action.option_strings]
        flags = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        faults.add(*(f"unknown flag {flag}{_hint(flag, known)}" for flag in flags))
        if unknown and not flags:  # beside unknown flags they may be those flags' values
            faults.add(f"stray argument '{unknown[0]}': values follow a --flag")
        notes = [f"--{name.replace('_', '-')} has no effect: {reason}" for name, (_, reason) in self.without_effect.items() if given.pop(name, None)]
        recipe = given.pop("config", None)
        settings = {}
        with faults.looking():
            settings = self.load(recipe) if recipe else {}
        for name, value in given.items():
            value = dict(value) if _value_type(self.fields[name]) is dict else value
            with faults.looking():
                settings[name] = self.value(name, value, where=_flags(name)[0])
        faults.refuse()
        return settings, notes


def refuse(rules: list[tuple[bool, str]]) -> None:
    """InputError with the messages of all rules that hold."""
    faults = Faults()
    faults.add(*(message for is_wrong, message in rules if is_wrong))
    faults.refuse()


def dump(settings) -> str:
    """YAML text of a settings dataclass that `--config` reads back to an equal one."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(settings).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
