"""Options declared once, as fields of a dataclass: type, default, meaning, and what a value may be.

From such a class come Hydra's schema, `--help`, the checks of values and the tables of `configs/README.md`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NOTHING
from dataclasses import Field, field, fields, is_dataclass
from math import isfinite
from textwrap import fill
from typing import Any, ClassVar, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from varestorer.utils.errors import UsageError

WIDTH, MOST_COLUMNS = 116, 30  # of a help text; of its keys
DEVICES = "auto | cpu | cuda | cuda:N | mps"
DTYPES = ("fp16", "bf16", "fp32")
LIMITS = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}

Options = TypeVar("Options")


def option(
    default: Any,
    text: str = "",
    shown: str | None = None,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    title: str = "",
) -> Any:
    """A field of a class of options.

    Args:
        default: also says what `--help` shows, unless it is null.
        text: what it does; what null means.
        shown: in place of the default.
        choices: what it may be; null may be allowed beside them.
        least, most, above, below: limits of the value, of a list those of each item.
        title: of the part of `--help` that begins with it.
    """
    limits = {"at least": least, "at most": most, "above": above, "below": below}
    metadata = {"text": text, "shown": shown, "title": title, "choices": choices, "limits": limits}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


class CommandOptions:
    """What a command's class says beside its options.

    `INTRO` is what it does, and the ways to call it; `NOTES` what it writes, its exit status, examples; `GROUPS`
    folders of `configs/` whose choices the help lists.
    """

    INTRO: ClassVar[str] = ""
    NOTES: ClassVar[str] = ""
    GROUPS: ClassVar[tuple[str, ...]] = ()


def typed(schema: type[Options], cfg: DictConfig) -> Options:
    """A config as its dataclass.

    What omegaconf raises for an unknown key or a value of another type becomes one line and exit status 2. UsageError:
    a value outside of what its option may be.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)  # of the class itself a key added with + would pass
    options = cast(Options, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain)))
    check(options)
    return options


def listed(options: type, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """All options of a class with their keys; those of a part (`data`) by their dotted names."""
    for item in fields(options):
        part = item.default_factory if isinstance(item.default_factory, type) else None
        if is_dataclass(part):
            yield from listed(part, f"{prefix}{item.name}.")
        elif item.metadata:
            yield f"{prefix}{item.name}", item


def shown(item: Field[Any]) -> str:
    """What help puts behind `key=`."""
    if item.metadata["shown"] is not None:
        return str(item.metadata["shown"])
    default = item.default if item.default_factory is NOTHING else item.default_factory()
    return str(default).lower() if isinstance(default, bool) else str(default)


def help_text(options: type[CommandOptions]) -> str:
    """What `--help` says of a command, without its groups."""
    lines, heads = [options.INTRO.strip()], {key: f"  {key}={shown(item)}" for key, item in listed(options)}
    column = min(max(map(len, heads.values())), MOST_COLUMNS)
    for key, item in listed(options):
        if title := item.metadata["title"]:
            lines.append(f"\n{title}")
        text = f"{heads[key]:{column}}  {item.metadata['text']}"
        indent = " " * (column + 2)
        lines.append(fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False))
    return "\n".join([*lines, "", options.NOTES.strip()]).strip()


def check(values: object, options: type | None = None, prefix: str = "") -> None:
    """Refuse values, of a class of options or a config of its keys, outside of what an option may be.

    UsageError: names the key (behind `prefix`), what it was and what it may be.
    """
    for item in fields(options or type(values)):  # type: ignore[arg-type]
        key = f"{prefix}{item.name}"
        if is_dataclass(item.default_factory):
            check(getattr(values, item.name), None if options is None else item.default_factory, f"{key}.")  # type: ignore[arg-type]
        elif item.metadata and (value := getattr(values, item.name)) is not None:
            for one in value if isinstance(value, list) else [value]:
                if wanted := _wanted(one, item.metadata):
                    raise UsageError(f"{key} must be {wanted}, got {key}={value}")


def _wanted(value: Any, rule: Mapping[str, Any]) -> str:
    """What a value should be; empty if it is."""
    if isinstance(value, float) and not isfinite(value):
        return "a finite number"
    if rule["choices"]:
        return "" if value in rule["choices"] else f"one of {', '.join(rule['choices'])}"
    limits = {words: limit for words, limit in rule["limits"].items() if limit is not None}
    if all(LIMITS[words](value, limit) for words, limit in limits.items()):
        return ""
    return " and ".join(f"{words} {limit:g}" for words, limit in limits.items())
