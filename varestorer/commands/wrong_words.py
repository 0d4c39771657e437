"""What is wrong with the words of a command, in one line: Hydra and OmegaConf take up to thirty."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from varestorer.utils.errors import UsageError

SHOWN = 3
LIKE = 0.7  # of two keys, 1 if they are the same
NOISE = ("object_type=", "reference_type=", "See https://hydra.cc")
FULL_KEY = "full_key:"
SHORT = {"-i": "input", "-o": "output"}
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # what Hydra's own -i takes


def check_words(words: Sequence[str], keys: Sequence[str]) -> None:
    """Refuse overrides that are neither `key=value` nor `~key`.

    Args:
        words: of the command line, without options.
        keys: of the command's config; where `input` is one of them, a bare word is taken for a forgotten `input=`.
    Raises:
        UsageError: names the word.
    """
    for word in words:
        key, equals, _ = word.partition("=")
        if word.startswith("~") or (equals and key.strip("+")):
            continue
        is_input = "input" in keys and not equals and not any(other.startswith("input=") for other in words)
        raise UsageError(f"{word!r} is not key=value; {f'did you mean input={word}?' if is_input else 'see --help'}")


def check_dashes(words: Sequence[str], keys: Sequence[str]) -> None:
    """Answer options written as other programs have them, `--input x` or `-i x`, with the form that they have here.

    Raises:
        UsageError: names the right words.
    """
    right = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, _, value = word.partition("=")
        key = SHORT.get(name) if following not in INFO else None
        key = name[2:].replace("-", "_") if name.startswith("--") else key
        if key in keys:
            value = value or ("" if following.startswith("-") else following)
            right.append(f"{key}={value or 'true'}")
    if right:
        raise UsageError(f"keys are written without dashes here: {' '.join(right)}")


def describe(error: BaseException, groups: Sequence[str] = ()) -> str:
    """An error of Hydra or OmegaConf in one line; the choices of a group follow on lines of their own.

    Args:
        error: as it was raised.
        groups: of configs that the command's config may be extended by: `+experiment=NAME`.
    """
    text = str(error)
    override = re.match(r"Could not override '([^']+)'", text)
    if merging := re.match(r"Error merging override (.*?)=", text):
        key, why = merging[1].lstrip("+"), _shortened(str(error.__cause__))
        return why if why.startswith(f"{key}:") else f"{key}: {why}"
    for cause in (error, error.__cause__):
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            key, inner = override[1] if override else "", str(cause.full_key)
            return _unknown(inner if inner.startswith(f"{key}.") else key or inner, _names(cause))
    if override and "No match in the defaults list" in text:
        key, added = override[1], re.search(r"use (\+\S+)", text)
        return f"{key!r} needs a +: {added[1]}" if key in groups and added else _unknown(key, [])
    word = getattr(error, "override", None)
    if word and str(word) not in text:
        text = f"{word}:\n{text}"
    if error.__cause__ and str(error.__cause__) not in text:
        text = f"{text}\n{error.__cause__}"
    return _shortened(text)


def _unknown(key: str, names: Sequence[str]) -> str:
    """The complaint about a key that is none of `names`."""
    tails = {name: name.rpartition(".")[2] for name in names}
    near_tails = get_close_matches(key.rpartition(".")[2], set(tails.values()), cutoff=LIKE)
    near = [*get_close_matches(key, names, cutoff=LIKE), *(name for name in names if tails[name] in near_tails)]
    guesses = ", ".join(list(dict.fromkeys(near))[:SHOWN])
    return f"no key {key!r}; {f'did you mean {guesses}? ' if guesses else ''}see --help"


def _names(error: ConfigKeyError | ConfigAttributeError) -> list[str]:
    """All keys of the config in which a key was looked for."""
    if error.parent_node is None:
        return []
    return list(_dotted(OmegaConf.to_container(error.parent_node._get_root(), resolve=False)))


def _dotted(config: Any, prefix: str = "") -> Iterator[str]:
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if (name := f"{prefix}{key}") != "hydra":
            yield name
            yield from _dotted(value, f"{name}.")


def _guess(lines: Sequence[str]) -> list[str]:
    """A line with the choice of a group that was probably meant."""
    wanted = re.search(r"Could not find '[^']*?([^/']+)'", "\n".join(lines))
    choices = [line.strip() for line in lines if line.startswith("\t")]
    near = get_close_matches(wanted[1], choices, n=1) if wanted else []
    return [f"no {wanted[1]!r} here; did you mean {near[0]}?"] if wanted and near else []


def _shortened(text: str) -> str:
    """The lines that a user can do something with, as one; lists of choices stay as they are."""
    lines, key = [], ""
    for line in filter(str.strip, text.splitlines()):
        stripped = line.strip()
        if stripped.startswith("Config search path"):
            break
        if stripped.startswith(FULL_KEY):
            key = stripped.removeprefix(FULL_KEY).strip()
        elif not stripped.startswith(NOISE):
            lines.append(line.rstrip())
    if any(line.startswith("Available options") for line in lines):
        return "\n".join([*_guess(lines), *lines])
    whole = " ".join(f"{line.strip()}{'' if line.endswith(('.', ':', ',', ';')) else ';'}" for line in lines)
    whole = whole.removesuffix(";")
    return whole if not key or re.search(rf"\b{re.escape(key)}\b", whole) else f"{key}: {whole}"
