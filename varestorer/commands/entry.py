"""The one door of every command: composes the config, runs, and ends with the right exit status.

Exit status: 0 all well; 1 something asked for failed; 2 the command itself was wrong; 130 interrupted.
Errors a user can mend are one line on stderr; the environment variable VARESTORER_TRACEBACK=1 adds where they
were raised.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import varestorer
from varestorer.commands.options import OPTIONS
from varestorer.commands.words import Keys, check_dashes, check_words, describe, expand_home, quote_value
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.schema import help_text, typed

LOG = logging.getLogger(__name__)
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# Hydra stays in the folder it was started in and leaves no folder behind: a run writes its own config.
SETTINGS = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra.sweep.dir='outputs/multirun/${now:%Y-%m-%d_%H-%M-%S}'",
    "hydra/job_logging=plain",
    "hydra/hydra_logging=plain",
)


@dataclass(frozen=True)
class Command:
    """One command, by the name that is typed after `varestorer`; its options are those of this name in `OPTIONS`.

    Its function takes the composed config (None: as it is, else a checked instance of the class `options`) and returns
    the exit status; it raises `UserError` if it cannot.
    """

    name: str
    function: Callable[[Any], int]
    options: type | None = None

    def main(self, argv: Sequence[str] | None = None, configs: Path | None = None) -> int:
        """Run the command with the words after it (None: the process's own), see `run`; returns the exit status."""
        words = list(sys.argv[1:] if argv is None else argv)
        for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the command
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            folder = (configs or config_dir()).resolve()
            if "--help" in words or "-h" in words:
                say(explain(self.name, folder))
                return OK
            return self._run(words, folder)
        except UserError as error:  # no configs
            return report(error)
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted\n")
            return INTERRUPTED

    def _run(self, words: list[str], folder: Path) -> int:
        """Hand the words to Hydra; errors of the job come back as statuses, Hydra's own as exceptions."""
        statuses: list[int] = []
        process = os.getpid()

        def job(cfg: DictConfig) -> int:
            """What Hydra calls: once, or for each job of a sweep."""
            if os.getpid() != process:  # a launcher's process: Hydra brings the exception home
                return call(self, cfg)
            try:
                status = call(self, cfg)
            except Exception as error:  # noqa: BLE001  # reported; a sweep goes on with its other jobs
                status = report(error)
            statuses.append(status)
            return status

        decorated = hydra.main(config_path=str(folder), config_name=self.name, version_base="1.3")(job)
        try:
            with _process_state(hydra_words(self, words, folder)):
                decorated()
        except SystemExit as done:  # of --cfg, --info
            return int(done.code or OK)
        except Exception as error:  # noqa: BLE001  # the last place where an error can become one line
            return report(error, OPTIONS[self.name].GROUPS)
        return max(statuses, default=OK)


class PlainFormatter(logging.Formatter):
    """Log lines in which file names cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, control characters as `visible` shows them."""
        return visible(super().format(record))


def call(command: Command, cfg: DictConfig) -> int:
    """Call a command's function; UsageError where a required key of the config is still `???`, or a value cannot be."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        example = " ".join(f"{key}=..." for key in missing)
        raise UsageError(f"no value for {', '.join(missing)}: add {example}")
    expand_home(cfg)
    return command.function(cfg if command.options is None else typed(command.options, cfg))


def report(error: BaseException, groups: Sequence[str] = ()) -> int:
    """Write an error to stderr, one line where the user can do something about it; returns its status."""
    if os.environ.get("VARESTORER_TRACEBACK") == "1":
        traceback.print_exception(error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):  # Hydra wraps what a constructor raises
        cause = cause.__cause__
    if cause is not None:
        _complain(str(cause))
        return int(getattr(cause, "exit_status", FAILED))
    if _is_usage(error):
        _complain(describe(error, groups))
        return USAGE
    traceback.print_exception(error)
    return FAILED


def say(text: str) -> None:
    """Print a result of a command: the one place of the package that writes to stdout."""
    try:
        print(visible(text), flush=True)  # noqa: T201
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; nor may Python flush again at its end
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")


def as_list(value: Any) -> list[str]:
    """A list of texts that an option holds; one alone is meant as a list of one, null as none."""
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def visible(text: str) -> str:
    """A text with its control characters, but for tabs and line ends, as escapes: names may hold any of them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def config_dir() -> Path:
    """The configs: the copy an installed package carries, else the checkout's; UserError if neither is there."""
    package = Path(varestorer.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "experiment").is_dir():
            return folder
    raise UserError(f"no configs in {package / 'configs'} or {package.parent / 'configs'}; reinstall varestorer")


def compose(config_name: str, overrides: Sequence[str] = (), configs: Path | None = None) -> DictConfig:
    """Compose a command's config without running it (for tests and notebooks); see `run` for `configs`."""
    folder = (configs or config_dir()).resolve()
    keys = Keys(config_name, folder, overrides)
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(config_name, [quote_value(word, keys) for word in overrides])


def explain(name: str, folder: Path) -> str:
    """The text of a command's `--help`, from `commands/options.py`; nothing of the command itself is imported."""
    return help_text(OPTIONS[name]) + "\n" + "".join(choices(folder, group) for group in OPTIONS[name].GROUPS)


def choices(folder: Path, group: str) -> str:
    """Help text for a group: its configs, each with the first comment line of its file."""
    files = sorted(path for path in (folder / group).glob("*.yaml") if not path.stem.endswith("_base"))
    width = max((len(path.stem) for path in files), default=0)
    lines = [f"  {path.stem:{width}}  {_first_comment(path)}".rstrip() for path in files]
    return "\n".join([f"\n{group}:", *lines, ""]) if files else ""


@contextlib.contextmanager
def _process_state(words: list[str]) -> Iterator[None]:
    """Give Hydra its words through `sys.argv`, and have it raise errors instead of calling `exit(1)`."""
    kept, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [kept[0], *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = kept
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full


def hydra_words(command: Command, words: Sequence[str], folder: Path) -> list[str]:
    """What Hydra gets to see: our settings, the overrides with their texts quoted, then the options.

    In this order settings can be overridden, and overrides may be written on both sides of an option. UsageError: an
    unknown option, or a word that is not `key=value`.
    """
    known = [item.name for item in fields(OPTIONS[command.name]) if item.name != "defaults"]  # type: ignore[arg-type]
    check_dashes(words, known)
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")

    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(list(words))
    options = list(words)
    for override in given.overrides:
        options.remove(override)
    completing = "-sc" in options or "--shell-completion" in options
    if not completing:
        check_words(given.overrides, known)
    settings = [] if completing else [f"hydra.job.name={command.name}", *SETTINGS]
    keys = Keys(given.config_name or command.name, folder, given.overrides, given.config_dir)
    return [*settings, *(quote_value(word, keys, given.multirun) for word in given.overrides), *options]


def _is_usage(error: BaseException) -> bool:
    """Whether an error is about the words of the command: a key, a value, or a constructor's argument."""
    if isinstance(error, InstantiationException):
        return isinstance(error.__cause__, TypeError) and "argument" in str(error.__cause__)
    return isinstance(error, HydraException | OmegaConfBaseException)


def _complain(text: str) -> None:
    sys.stderr.write(f"error: {visible(text.strip())}\n")


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if re.match(r"#(?! *@package)", line)), "")
