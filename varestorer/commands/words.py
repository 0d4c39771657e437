"""The words of a command line: texts and paths arrive as they were typed, whatever Hydra's grammar would make of them.

What is wrong with a word is told in one line, for which Hydra and OmegaConf take up to thirty.

Which keys hold texts is not listed anywhere: a command's config says it by the values that are there, its dataclass by
the types, and where a key belongs to a `_target_`, the annotations of what is called.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode, open_dict, read_write
from omegaconf.base import Node
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from varestorer.utils.errors import UsageError

LITERAL = ("input", "output", "prompt", "ckpt", "predictions", "text_encoder", "captioner", "make", "source", "shard")
"""Keys in which `${...}` refers to no other key, and a comma begins no sweep: what users have, or say."""

FREE_TEXT = ("prompt",)  # in which `~` is no folder
SHOWN = 3
LIKE = 0.7  # of two keys, 1 if they are the same
NOISE = ("object_type=", "reference_type=", "See https://hydra.cc")
FULL_KEY = "full_key:"
SHORT = {"-i": "input", "-o": "output"}
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # what Hydra's own -i takes


Kind = Literal["text", "texts", "other"] | None
"""What a key holds: a text, a list of texts, other values (numbers, choices of a group, ...); None: it is not known."""


class Keys:
    """What the keys of a command hold, by its config's name, the folder of configs and `more` of them (`--config-dir`).

    Groups that the overrides `words` of the command line choose bring keys with them.
    """

    def __init__(self, config_name: str, folder: Path, words: Sequence[str] = (), more: str | None = None) -> None:
        self.config_name, self.folder, self.more = config_name, folder, more
        self.choices = [word for word in words if self._is_group(word)]

    def kind(self, key: str) -> Kind:
        """What a key holds; a stage's own `data.root` is what `data.root` is."""
        if self._is_group(f"{key}="):
            return "other"
        parts = key.split(".")
        return next(filter(None, (self._kind_of(parts[start:]) for start in range(len(parts)))), None)

    def _is_group(self, word: str) -> bool:
        name = re.match(r"[+~]*([\w/]+)(@[\w.:]*)?=", word)
        places = [self.folder, *([Path(self.more)] if self.more else [])]
        return name is not None and any((place / name[1]).is_dir() for place in places)

    @cached_property
    def config(self) -> DictConfig:
        """The config of the chosen groups; empty if they cannot be composed, which Hydra will tell."""
        with suppress(Exception):
            return _composed(self.config_name, self.folder, tuple(self.choices), self.more)
        return OmegaConf.create()

    def _kind_of(self, parts: Sequence[str]) -> Kind:
        """What the key at this place of the config holds: by its value, its type, or who is given it."""
        node: Any = self.config
        target: tuple[str, Sequence[str]] | None = None
        for depth, part in enumerate(parts):
            if isinstance(node, ListConfig) or not isinstance(node, DictConfig) or node._is_none():
                break
            name = node._get_node("_target_", validate_access=False)
            if isinstance(name, Node) and isinstance(name._value(), str):
                target = name._value(), parts[depth:]
            node = node._get_node(part, validate_access=False)
        kind = None if node is None else _kind_of_node(node)
        return kind if kind or target is None else _kind_of_argument(*target)


@cache
def _composed(config_name: str, folder: Path, choices: tuple[str, ...], more: str | None) -> DictConfig:
    path = [f"hydra.searchpath=['file://{Path(more).resolve()}']"] if more else []
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(config_name, [*path, *choices])


def _kind_of_node(node: Any) -> Kind:
    if isinstance(node, StringNode):
        return "text"
    if isinstance(node, ListConfig):
        items = node._content if isinstance(node._content, list) else []
        are_texts = bool(items) and all(isinstance(item._value(), str) for item in items)
        return "texts" if are_texts or node._metadata.element_type is str else "other"
    if isinstance(node, DictConfig):
        return None if node._is_none() or node._is_missing() else "other"
    value = node._value()
    if value is None or node._is_missing():
        return None if node._metadata.ref_type in (Any, None) else "other"
    if isinstance(value, str) and re.fullmatch(r"\$\{[\w.]+\}", value):  # what it refers to may be of any type
        return None
    return "text" if isinstance(value, str) else "other"


def _kind_of_argument(target: str, parts: Sequence[str]) -> Kind:
    """What an argument of a constructor or function holds, or an entry of one that is a mapping."""
    try:
        annotation = str(inspect.signature(get_object(target)).parameters[parts[0]].annotation)
    except Exception:  # noqa: BLE001  # whatever is wrong with it, Hydra tells it when it is called
        return None
    for _ in parts[1:]:
        entry = re.search(r"(?:Mapping|[dD]ict)\[\s*str\s*,(.*)\]", annotation)
        annotation = entry[1] if entry else ""
    names = set(re.findall(r"\w+", annotation))
    if names & {"int", "float", "bool", "dict", "Mapping", "Any"} or not names & {"str", "Path", "PathLike"}:
        return None
    return "texts" if names & {"list", "Sequence", "Iterable", "tuple"} else "text"


def quote_value(word: str, keys: Keys | None = None, is_sweep: bool = False) -> str:
    """Quote the value of a `key=value` word whose value is free text or a path.

    `prompt=a dog, on grass` becomes `prompt='a dog, on grass'`. A value in quotes already, `null` and `???`
    stay as they are. Without `keys` only what Hydra cannot read is quoted; in a sweep `key=a,b` means two jobs.
    """
    match = re.fullmatch(r"(\+{0,2})([\w./@]+)=(.*)", word, flags=re.DOTALL)
    if match is None:
        return word
    plus, key, value = match.groups()
    is_literal = key in LITERAL
    if value.lower() == "null" or value == "???" or _is_quoted(value) or (not is_literal and _is_plain(value)):
        return word
    kind: Kind = "text" if is_literal else keys.kind(key) if keys else None
    if kind == "texts":
        return f"{plus}{key}={_quote_items(value)}"
    if kind == "other" or (not is_literal and _is_readable(value, kind, is_sweep)):
        return word
    if is_literal:  # OmegaConf reads ${...} in quoted text too; `\` before it says to leave it alone
        value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return f"{plus}{key}={_quoted(value)}"


def _is_plain(value: str) -> bool:
    """Whether Hydra reads a value as the text that it is."""
    is_word = re.fullmatch(r"[A-Za-z_./][\w./-]*", value, flags=re.ASCII) is not None
    return is_word and value.lower() not in ("true", "false", "nan", "inf")


def _is_readable(value: str, kind: Kind, is_sweep: bool) -> bool:
    """Whether a value is left to Hydra: a sweep over words, or what it can read where nobody knows the type."""
    try:
        override = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    if not override.is_sweep_override():
        return kind is None
    sweep = override.value()
    if not is_sweep:  # Hydra says what to do about `key=a,b`, but nobody means that by a path
        return kind is None and not re.search(r"[/\s]", value)
    if not isinstance(sweep, ChoiceSweep) or not sweep.simple_form:
        return True
    return all(isinstance(item, QuotedString) or re.fullmatch(r"[\w.+-]+", str(item)) for item in sweep.list)


def _quote_items(value: str) -> str:
    """Quote the texts of a list, which may be written without its brackets; commas in texts need quotes."""
    inner = value.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    items = re.findall(r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,]+?)\s*(?:,|$)""", inner)
    return f"[{','.join(item if _is_quoted(item) else _quoted(item) for item in items if item.strip())}]"


def _quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _is_quoted(value: str) -> bool:
    """Whether a value is one quoted string in Hydra's grammar."""
    return re.fullmatch(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", value, flags=re.DOTALL) is not None


def expand_home(cfg: DictConfig) -> None:
    """Put the user's folder for `~` wherever a config holds a path in it.

    UsageError: nothing says what the user's folder is (a container without HOME).
    """
    with open_dict(cfg), read_write(cfg):
        _expand(cfg, "")


def _expand(node: DictConfig | ListConfig, prefix: str) -> None:
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        child, name = node._get_node(key), f"{prefix}{key}"
        if isinstance(child, DictConfig | ListConfig):
            _expand(child, f"{name}.")
            continue
        value = child._value() if isinstance(child, Node) else None
        if isinstance(value, str) and name not in FREE_TEXT and re.match(r"~(/|$)", value):
            expanded = os.path.expanduser(value)
            if expanded == value:
                raise UsageError(
                    f"{name}={value}: no home folder is known here (HOME is not set); write the whole path"
                )
            node[key] = expanded


def check_words(words: Sequence[str], keys: Sequence[str]) -> None:
    """Refuse overrides that are neither `key=value` nor `~key` by a UsageError that names the word.

    Where `input` is one of the command's keys, a bare word is taken for a forgotten `input=`.
    """
    for word in words:
        key, equals, _ = word.partition("=")
        if word.startswith("~") or (equals and key.strip("+")):
            continue
        is_input = "input" in keys and not equals and not any(other.startswith("input=") for other in words)
        raise UsageError(f"{word!r} is not key=value; {f'did you mean input={word}?' if is_input else 'see --help'}")


def check_dashes(words: Sequence[str], keys: Sequence[str]) -> None:
    """Answer options written as other programs have them, `--input x` or `-i x`, with the form that they have here.

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

    The groups are those that the command's config may be extended by: `+experiment=NAME`.
    """
    text = str(error)
    override = re.match(r"Could not override '([^']+)'", text)
    if merging := re.match(r"Error merging override (.*?)=", text):
        key, why = merging[1].lstrip("+"), _shortened(str(error.__cause__))
        return why if why.startswith(f"{key}:") else f"{key}: {why}"
    for cause in (error, error.__cause__):
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            key, inner = override[1] if override else "", str(cause.full_key)
            root = OmegaConf.create() if cause.parent_node is None else cause.parent_node._get_root()
            names = list(_dotted(OmegaConf.to_container(root, resolve=False)))
            return _unknown(inner if inner.startswith(f"{key}.") else key or inner, names)
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


def _dotted(config: Any, prefix: str = "") -> Iterator[str]:
    """All keys of a config."""
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
