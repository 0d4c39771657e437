"""The one door of every command: composes the config, runs, and ends with the right exit status.

Exit status: 0 all well; 1 something asked for failed; 2 the command itself was wrong; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import varestorer
from varestorer.utils.errors import UsageError, UserError

LOG = logging.getLogger(__name__)
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# Values of these keys are free text or paths: people write commas, brackets and spaces in them.
TEXT_KEYS = ("input", "output", "prompt", "ckpt", "predictions")
PLACE_KEYS = ("run_dir", "out", "data.root", "fixtures")  # as above, but may refer to other keys: ${seed}

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
    """One command.

    Attributes:
        name: as typed after `varestorer`.
        config_name: of its config in `configs/`.
        function: takes the composed config, returns the exit status; raises `UserError` for what a user can fix.
        help: the text of `--help`.
        groups: folders of `configs/` whose choices the help lists.
    """

    name: str
    config_name: str
    function: Callable[[DictConfig], int]
    help: str
    groups: tuple[str, ...] = ()

    def main(self, argv: Sequence[str] | None = None, configs: Path | None = None) -> int:
        """Run the command.

        Args:
            argv: words after the command; None for the process's own.
            configs: folder of configs; None for the package's.
        Returns:
            the exit status.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        folder = (configs or config_dir()).resolve()
        if "--help" in words or "-h" in words:
            say(self.help.strip() + "\n" + "".join(choices(folder, group) for group in self.groups))
            return OK
        try:
            return self._run(words, folder)
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted\n")
            return INTERRUPTED

    def _run(self, words: list[str], folder: Path) -> int:
        """Hand the words to Hydra; errors of the job come back as statuses, Hydra's own as exceptions."""
        import hydra

        job = _Job(self.function)
        decorated = hydra.main(config_path=str(folder), config_name=self.config_name, version_base="1.3")(job)
        with _process_state(self.name, words):
            try:
                decorated()
            except SystemExit as done:  # of argparse and of --cfg, --info
                return int(done.code or OK)
            except Exception as error:  # noqa: BLE001  # the last place where an error can become one line
                return report(error)
        return max(job.statuses, default=OK)


class _Job:
    """What Hydra calls: once, or for each job of a sweep."""

    def __init__(self, function: Callable[[DictConfig], int]) -> None:
        self.function = function
        self.statuses: list[int] = []
        self.process = os.getpid()

    def __call__(self, cfg: DictConfig) -> int:
        if os.getpid() != self.process:  # a launcher's process: Hydra brings the exception home
            return run_function(self.function, cfg)
        try:
            status = run_function(self.function, cfg)
        except Exception as error:  # noqa: BLE001  # reported; a sweep goes on with its other jobs
            status = report(error)
        self.statuses.append(status)
        return status


def run_function(function: Callable[[DictConfig], int], cfg: DictConfig) -> int:
    """Call a command's function, once all required keys have values.

    Raises:
        UsageError: a key of the config is still `???`.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UsageError(f"no value for {', '.join(missing)}: add {' '.join(f'{key}=...' for key in missing)}")
    return function(cfg)


def report(error: BaseException) -> int:
    """Write an error to stderr, one line where the user can do something about it; returns its status."""
    if os.environ.get("VARESTORER_TRACEBACK") == "1":
        traceback.print_exception(error)
    cause = _find(error, UserError)
    if cause is not None:
        _complain(str(cause))
        return int(getattr(cause, "exit_status", FAILED))
    if _is_usage(error):
        inner = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
        _complain(f"{error}\n{inner}" if inner is not None else str(error))
        return USAGE
    traceback.print_exception(error)
    return FAILED


def say(text: str) -> None:
    """Print a result of a command: the one place of the package that writes to stdout."""
    print(text, flush=True)  # noqa: T201


def config_dir() -> Path:
    """The configs: the copy an installed package carries, else the checkout's.

    Raises:
        UserError: neither is there.
    """
    package = Path(varestorer.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"no configs in {package / 'configs'} or {package.parent / 'configs'}; install varestorer again")


def compose(config_name: str, overrides: Sequence[str] = (), configs: Path | None = None) -> DictConfig:
    """Compose a command's config without running it (for tests and notebooks).

    Args:
        config_name: such as `train`.
        overrides: as on the command line.
        configs: folder of configs; None for the package's.
    """
    import hydra

    folder = (configs or config_dir()).resolve()
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(config_name, [quote_value(word) for word in overrides])


def choices(folder: Path, group: str) -> str:
    """Help text for a group: its configs, each with the first comment line of its file."""
    files = sorted(path for path in (folder / group).glob("*.yaml") if not path.stem.endswith("_base"))
    width = max((len(path.stem) for path in files), default=0)
    lines = [f"  {path.stem:{width}}  {_first_comment(path)}".rstrip() for path in files]
    return "\n".join([f"\n{group}:", *lines, ""]) if files else ""


def quote_value(word: str) -> str:
    """Quote the value of a `key=value` word whose value is free text or a path.

    `prompt=a dog, on grass` becomes `prompt='a dog, on grass'`. A value in quotes already, `null` and `???`
    stay as they are.
    """
    match = re.fullmatch(r"(\+{0,2})([\w.]+)=(.*)", word, flags=re.DOTALL)
    if match is None or match[2] not in TEXT_KEYS + PLACE_KEYS:
        return word
    plus, key, value = match.groups()
    if value.lower() == "null" or value == "???" or _is_quoted(value):
        return word
    from hydra.core.override_parser.types import Quote, QuotedString

    if key in TEXT_KEYS:  # OmegaConf reads ${...} in quoted text too; `\` before it says to leave it alone
        value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return f"{plus}{key}={QuotedString(text=value, quote=Quote.single).with_quotes()}"


def _is_quoted(value: str) -> bool:
    """Whether a value is one quoted string in Hydra's grammar."""
    return re.fullmatch(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", value, flags=re.DOTALL) is not None


@contextlib.contextmanager
def _process_state(name: str, words: list[str]) -> Iterator[None]:
    """Words and settings Hydra takes from the process; exceptions come back instead of its own exit(1)."""
    completing = any(word in ("-sc", "--shell-completion") for word in words)
    settings = [] if completing else [f"hydra.job.name={name}", *SETTINGS]
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    options = [word for word in words if word.startswith("-")]
    sys.argv = [argv[0], *_options_first(words), *settings] if not options else [argv[0], *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
