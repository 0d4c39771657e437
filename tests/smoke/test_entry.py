"""The entry of every command: exit status, quoting, help, one line per error, sweeps, a whole toy training."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

import varestorer
from varestorer.commands import main
from varestorer.commands.entry import Command, compose, config_dir, hydra_words
from varestorer.commands.options import OPTIONS
from varestorer.commands.train import COMMAND as TRAIN
from varestorer.commands.words import quote_value
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.schema import CommandOptions, option, typed

TOYS = Path(__file__).parents[1]  # toy_training.py


@pytest.fixture(autouse=True)
def root_logger():
    """Hydra sets up logging for the process; give it back as it was."""
    kept, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = kept
    logging.root.setLevel(level)


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder of configs with our logging alone."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "hydra").symlink_to(config_dir() / "hydra")
    return folder


def command(function, config_name: str = "toy") -> Command:
    return Command(config_name, function)


@dataclass
class Root:
    root: str | None = None


@dataclass
class Toy(CommandOptions):
    INTRO: ClassVar[str] = "toy help"
    GROUPS: ClassVar[tuple[str, ...]] = ("experiment",)

    prompt: str | None = option(None, "a text", "TEXT")
    input: str | None = option(None, "a file", "FILE")
    run_dir: str | None = None
    data: Root = field(default_factory=Root)
    seed: int = 0
    list: Any = field(default_factory=lambda: [1])


@dataclass
class Needs(CommandOptions):
    ckpt: str = MISSING
    data: Root = field(default_factory=lambda: Root(MISSING))


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in (("toy", Toy), ("needs", Needs)):
        ConfigStore.instance().store(name, options)
        monkeypatch.setitem(OPTIONS, name, options)


def ok(cfg: DictConfig) -> int:
    return 0


TEXTS = [
    "a dog, on grass",
    "photo (1).jpg",
    "a=b",
    "#1 of 2",
    "it's",
    'say "cheese"',
    "both ' and \"",
    "{curly} [square], (round): all",
    "C:\\photos\\",
    "back\\'slash",
    "two \\\\",
    "${seed} costs $5 and ${oc.env:HOME}",
    "\\${seed}",
    "naïve 日本語 🐕",
    "  spaces  ",
    "tab\tand\nline",
    "123",
    "true",
    "~/x*?;&|<>!",
    "'quoted', and 'more'",
    "@a/b:c%",
    "'",
    "-m",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["prompt", "input"])
def test_texts_arrive_as_they_were_typed(configs: Path, text: str, key: str):
    cfg = compose("toy", [f"{key}={text}"], configs)
    assert cfg[key] == text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("prompt='a, b'", "a, b"),
        ('prompt="it\'s"', "it's"),
        ("prompt=null", None),
        ("prompt=", ""),
        ("++prompt=a, b", "a, b"),
    ],
)
def test_values_in_quotes_and_null_keep_their_meaning(configs: Path, word: str, value):
    assert compose("toy", [word], configs).prompt == value


def test_places_may_refer_to_other_keys_and_others_are_left_to_hydra(configs: Path):
    cfg = compose("toy", ["run_dir=runs, all/${seed}", "data.root=my photos (2)", "list=[2,3]", "seed=4"], configs)
    assert (cfg.run_dir, cfg.data.root, cfg.list) == ("runs, all/4", "my photos (2)", [2, 3])
    assert quote_value("seed=1,2") == "seed=1,2" and quote_value("--cfg") == "--cfg"


def test_words_and_options_may_be_mixed(configs: Path):
    words = hydra_words(command(ok), ["a=1", "--cfg", "job", "prompt=x, y"], configs)
    assert words[-4:] == ["a=1", "prompt='x, y'", "--cfg", "job"]


def test_ok_is_0_and_the_function_gets_the_config(configs: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    status = command(lambda cfg: seen.append(OmegaConf.to_container(cfg)) or 0).main(["seed=3"], configs)
    assert status == 0 and seen[0]["seed"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs"]  # Hydra leaves nothing behind


@pytest.mark.parametrize(("error", "status"), [(UserError("no such\nthing"), 1), (UsageError("which of the two?"), 2)])
def test_our_errors_are_told_without_a_traceback(configs: Path, capsys, error: Exception, status: int):
    def fail(cfg: DictConfig) -> int:
        raise error

    assert command(fail).main([], configs) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_error_inside_instantiate_is_still_ours(configs: Path, capsys):
    def fail(cfg: DictConfig) -> int:
        from hydra.utils import instantiate

        return instantiate({"_target_": "varestorer.utils.device.pick_device", "name": "abacus"})

    assert command(fail).main([], configs) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: device must be") and captured.count("\n") == 1


def test_returned_status_and_other_exceptions(configs: Path, capsys):
    assert command(lambda cfg: 1).main([], configs) == 1
    assert command(lambda cfg: 1 // 0).main([], configs) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_ctrl_c_is_130(configs: Path, capsys):
    def interrupt(cfg: DictConfig) -> int:
        raise KeyboardInterrupt

    assert command(interrupt).main([], configs) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sead=1"], "sead"),
        (["seed=[1"], "seed=[1"),
        (["seed"], "seed"),
        (["+experiment=nothing_like_it"], "experiment"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_wrong_words_are_2(configs: Path, capsys, words: list[str], told: str):
    (configs / "experiment").mkdir()
    (configs / "experiment" / "real.yaml").write_text("# @package _global_\nseed: 1\n")
    status = command(ok).main(words, configs)
    captured = capsys.readouterr().err
    assert status == 2 and told in captured and "Traceback" not in captured


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sead=1"], "no key 'sead'; did you mean seed? see --help"),
        (["root=x"], "no key 'root'; did you mean data.root? see --help"),
        (["+bogus=1"], "no key 'bogus'; see --help"),
        (["data={rot: a}"], "no key 'data.rot'; did you mean data.root? see --help"),
        (["photo (1).jpg"], "'photo (1).jpg' is not key=value; did you mean input=photo (1).jpg?"),
        (["input=a", "b.jpg"], "'b.jpg' is not key=value; see --help"),
        (["=3"], "'=3' is not key=value; see --help"),
        (["seed=x"], "seed: Value 'x' of type 'str' could not be converted to Integer"),
        (["seed=[1"], "seed=[1: no viable alternative at input '[1'"),
        (["experiment=real"], "'experiment' needs a +: +experiment=real"),
        (["other=real"], "no key 'other'; see --help"),
        (["--input", "a b.jpg", "--run-dir=y"], "keys are written without dashes here: input=a b.jpg run_dir=y"),
        (["-i", "photo.jpg"], "keys are written without dashes here: input=photo.jpg"),
        (["--nosuch"], "unrecognized arguments: --nosuch; see --help"),
        (
            ["+experiment=unreal"],
            "no 'unreal' here; did you mean real?\n"
            "In 'toy': Could not find 'experiment/unreal'\nAvailable options in 'experiment':\n\treal",
        ),
    ],
)
def test_wrong_words_are_told_in_one_line_but_for_choices(configs: Path, capsys, words: list[str], told: str):
    for group in ("experiment", "other"):
        (configs / group).mkdir()
        (configs / group / "real.yaml").write_text("# @package _global_\nseed: 1\n")
    assert Command("toy", lambda cfg: typed(Toy, cfg).seed).main(words, configs) == 2
    assert capsys.readouterr().err == f"error: {told}\n"


def test_missing_values_are_named_all_at_once(configs: Path, capsys):
    assert command(ok, "needs").main([], configs) == 2
    assert "ckpt=... data.root=..." in capsys.readouterr().err
    assert command(ok, "needs").main(["ckpt=a b", "data.root=c"], configs) == 0


def test_a_sweep_runs_every_job_and_reports_the_worst(configs: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def job(cfg: DictConfig) -> int:
        seen.append((cfg.seed, cfg.prompt))
        return 1 if cfg.seed == 1 else 0

    assert command(job).main(["-m", "seed=1,2", "prompt=a, b"], configs) == 1
    assert seen == [(1, "a, b"), (2, "a, b")]
    assert list((tmp_path / "outputs" / "multirun").iterdir())


def test_help_is_ours_and_config_is_hydras(configs: Path, capsys):
    assert command(ok).main(["seed=1", "--help"], configs) == 0
    assert "prompt=TEXT" in capsys.readouterr().out
    assert command(ok).main(["--cfg", "job", "seed=7"], configs) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_dispatch(capsys):
    assert main(["--help"]) == 0
    assert "restore" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["tarin"]) == 2
    assert "no command 'tarin'" in capsys.readouterr().err
    assert main(["--version"]) == 0 and varestorer.__version__ in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "resume=none" in capsys.readouterr().out


def test_train_help_lists_experiments(configs: Path, capsys):
    (configs / "experiment").mkdir()
    (configs / "experiment" / "tiny.yaml").write_text("# @package _global_\n# two numbers, a second\nseed: 1\n")
    assert TRAIN.main(["-h"], configs) == 0
    assert "tiny  two numbers, a second" in capsys.readouterr().out


STAGES = {
    "first": {"task": {"_target_": "toy_training.ToyTask", "part": "first"}, "trainer": {"max_steps": 4}},
    "second": {"task": {"_target_": "toy_training.ToyTask"}, "optimizer": {"lr": 0.02}},
}


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch) -> list[str]:
    """Words of a command that trains the toy system in two stages."""
    monkeypatch.syspath_prepend(TOYS)
    monkeypatch.chdir(tmp_path)
    extra = tmp_path / "extra"
    toys = [{f"override /{group}": "toy"} for group in ("system", "model", "data")]
    groups = [*toys, {"override /logger": "none"}]
    files = {
        "system/toy.yaml": {"_target_": "toy_training.ToySystem"},
        "model/toy.yaml": {"width": 3},
        "data/toy.yaml": {"_target_": "toy_training.ToyPairs", "seed": "${seed}"},
        "experiment/toy.yaml": {
            "defaults": groups,
            "stages": STAGES,
            "heldout": None,
            "trainer": {"max_steps": 5, "batch_size": 2, "num_workers": 0, "checkpoint_every": 2},
        },
    }
    for name, content in files.items():
        (extra / name).parent.mkdir(parents=True, exist_ok=True)
        package = {"experiment": "_global_", "system": "model"}.get(name.partition("/")[0])
        head = f"# @package {package}\n" if package else ""
        (extra / name).write_text(head + yaml.safe_dump(content, sort_keys=False))
    return ["+experiment=toy", "device=cpu", "--config-dir", str(extra)]


def lines(run_dir: Path) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, where nothing of this one can help."""
    paths = os.pathsep.join([str(Path(varestorer.__file__).parents[1]), str(TOYS)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.smoke
@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, experiment: list[str]):
    words = [*experiment, "+stages.first.task.dropout=0", "+stages.second.task.dropout=0"]
    call("varestorer", "train", *words, "run_dir=one")
    call("torch.distributed.run", "--nproc_per_node=2", "-m", "varestorer", "train", *words, "run_dir=two")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 9
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) < 1e-5


@pytest.mark.smoke
def test_training_leaves_what_the_design_says(tmp_path: Path, experiment: list[str]):
    done = call("varestorer", "train", *experiment)
    (run_dir,) = (tmp_path / "outputs" / "toy").iterdir()
    assert str(run_dir.relative_to(tmp_path)) in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["extra", "outputs"]
    assert [(line["stage"], line["step"]) for line in lines(run_dir)] == [
        *(("first", step) for step in range(1, 5)),
        *(("second", step) for step in range(1, 6)),
    ]
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["trainer"]["precision"] == "auto" and config["environment"]["packages"]["torch"]
    assert (run_dir / "samples" / "second_000005.png").is_file()
    assert (run_dir / "checkpoints" / "initial.safetensors").is_file()
    assert (run_dir / "checkpoints" / "finished").is_file()


@pytest.mark.smoke
def test_a_killed_training_resumes_to_the_same_numbers(tmp_path: Path, experiment: list[str], monkeypatch, capsys):
    assert TRAIN.main([*experiment, "run_dir=whole"]) == 0
    folder = ["run_dir=my runs, killed"]
    monkeypatch.setenv("TOY_FAILS_AT", "second/4")
    assert TRAIN.main([*experiment, *folder]) == 1
    assert "KilledError" in capsys.readouterr().err
    monkeypatch.delenv("TOY_FAILS_AT")
    assert TRAIN.main([*experiment, *folder]) == 2
    refused = capsys.readouterr().err
    assert "resume=auto" in refused and "Traceback" not in refused
    assert TRAIN.main([*experiment, *folder, "resume=auto"]) == 0
    assert lines(tmp_path / "my runs, killed") == lines(tmp_path / "whole")


@pytest.mark.smoke
def test_resume_finds_the_newest_unfinished_run(tmp_path: Path, experiment: list[str], monkeypatch):
    monkeypatch.setenv("TOY_FAILS_AT", "second/1")
    assert TRAIN.main(experiment) == 1
    monkeypatch.delenv("TOY_FAILS_AT")
    assert TRAIN.main([*experiment, "trainer.max_steps=1", "seed=1"]) == 0
    killed, finished = sorted((tmp_path / "outputs" / "toy").iterdir())
    assert [(line["stage"], line["step"]) for line in lines(finished)] == [("first", 1), ("second", 1)]
    assert TRAIN.main([*experiment, "resume=auto"]) == 0
    assert (killed / "checkpoints" / "finished").is_file() and len(lines(killed)) == 9
    assert TRAIN.main([*experiment, "trainer.max_steps=1", "resume=auto"]) == 0
    assert len(list((tmp_path / "outputs" / "toy").iterdir())) == 3  # none was unfinished


@pytest.mark.smoke
def test_errors_of_training_are_one_line(tmp_path: Path, experiment: list[str], capsys):
    assert TRAIN.main([*experiment, "trainer.batch_size=0"]) == 2
    assert "error: trainer.batch_size must be at least 1, got" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()
    assert TRAIN.main([*experiment, "+stages.second.task.nan_at=1"]) == 1
    captured = capsys.readouterr().err
    assert "step 1 of stage second: loss part l1 is not finite" in captured and "Traceback" not in captured
    assert TRAIN.main([*experiment, "+model.depth=3"]) == 2
    assert "depth" in capsys.readouterr().err
    assert TRAIN.main(["model=toy", "data=toy", "heldout=null", *experiment[1:]]) == 2
    assert "add +experiment=quickstart" in capsys.readouterr().err
