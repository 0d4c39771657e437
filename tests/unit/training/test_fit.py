"""The training loop: resume, averages, accumulation, errors, files; the length of a step and its gradients' norm."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import get_worker_info
from toy_training import ADAMW, KilledError, ToyPairs, ToySystem, ToyTask, config, metrics, train

from varestorer.data import PhotoCrops
from varestorer.data import workers as data_workers
from varestorer.data.loader import collate
from varestorer.training import stage
from varestorer.training.config import TrainerConfig
from varestorer.training.fit import fit, make_accelerator
from varestorer.training.optim import Ema, build_optimizer
from varestorer.training.run import Run
from varestorer.training.stopping import StoppedError, StopRequest, leave_signals_to_parent
from varestorer.utils.errors import UserError
from varestorer.utils.images import save_image
from varestorer.utils.loggers import Logger
from varestorer.weights.runs import load_ema, load_run_weights, read_tensors


def test_metrics_have_the_agreed_form(tmp_path: Path):
    train(tmp_path, config())
    raw = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in raw] == list(range(1, 9))
    assert list(raw[0]) == ["stage", "step", "loss", "mse", "l1", "lr", "grad_norm", "seconds"]
    assert raw[0]["lr"] == pytest.approx(0.01) and raw[1]["lr"] == pytest.approx(0.02)
    assert raw[0]["loss"] == pytest.approx(raw[0]["mse"] + 0.1 * raw[0]["l1"], rel=1e-6)
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(raw, raw[1:], strict=False))


@pytest.mark.parametrize("fail_at", [1, 3, 5, 8])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, fail_at: int):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    system = train(whole, config(sample_every=2), preview=True)
    with pytest.raises(KilledError):
        train(cut, config(), fail_at=fail_at)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "toy", "step"')  # half a line, as a kill can leave it
    resumed = train(cut, config())
    assert metrics(cut) == metrics(whole)
    for name in ("model", "ema", "optimizer", "rng"):
        path = f"checkpoints/toy/step_000008/{name}.safetensors"
        one, other = load_file(whole / path), load_file(cut / path)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), resumed.parameters(), strict=True))


def test_accumulation_does_not_change_the_result(tmp_path: Path):
    train(tmp_path / "a", config(), dropout=0)  # which draws other numbers for other shapes
    train(tmp_path / "b", config(accumulate=2), dropout=0)
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["l1"] == pytest.approx(other["l1"], rel=1e-5)


class KeepsKeys(ToyTask):
    """Keeps the sample numbers it was given."""

    def forward(self, batch, step):
        self.keys = [*getattr(self, "keys", []), *batch["key"].tolist()]
        return super().forward(batch, step)


def test_a_resume_goes_on_with_the_next_sample_also_with_accumulation(tmp_path: Path):
    seen = []
    for fail_at in (6, 0):
        torch.manual_seed(5)
        task = KeepsKeys(ToySystem(), fail_at=fail_at)
        task.name = "toy"
        run = Run(tmp_path, make_accelerator("cpu"), seed=1)
        with pytest.raises(KilledError) if fail_at else contextlib.nullcontext():
            fit(task, ToyPairs(), config(batch_size=6, accumulate=3), ADAMW, run)
        seen.append(task.keys)
    assert seen == [list(range(5 * 6 + 2)), list(range(3 * 6, 8 * 6))]
    states = [json.loads((tmp_path / f"checkpoints/toy/step_{n:06d}/state.json").read_text()) for n in (6, 8)]
    assert [state["samples"] for state in states] == [36, 48]


def test_a_resume_with_other_data_is_refused_unless_it_is_wanted(tmp_path: Path, caplog):
    for number in range(6):
        save_image(tmp_path / "photos" / f"{number}.png", torch.rand(3, 8, 8 + number))

    def go_on(max_steps: int, accept: bool = False) -> None:
        run = Run(tmp_path / "run", make_accelerator("cpu"))
        run.accept_other_data = accept
        torch.manual_seed(5)
        task = ToyTask(ToySystem())
        task.name = "toy"
        fit(task, PhotoCrops(str(tmp_path / "photos"), 4, None, seed=0), config(max_steps=max_steps), ADAMW, run)

    go_on(2)
    go_on(3)
    (tmp_path / "photos/2.png").unlink()
    (tmp_path / "photos/3.png").rename(tmp_path / "photos/x.png")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    wanted = r"stage toy changed since .*step_000003 was saved: 1 removed \(2.png\); 1 renamed \(3.png -> x.png\)\."
    with pytest.raises(UserError, match=f"{wanted} .* in another order .*: resume_other_data=true$"):
        go_on(4)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    go_on(4, accept=True)
    assert "1 removed (2.png); 1 renamed (3.png -> x.png); going on" in caplog.text
    go_on(5)
    assert len(metrics(tmp_path / "run")) == 5
    (tmp_path / "run/checkpoints/toy/step_000005/data.json").unlink()
    sums = tmp_path / "run/checkpoints/toy/step_000005/checksums.json"
    sums.write_text(json.dumps({k: v for k, v in json.loads(sums.read_text()).items() if k != "data.json"}))
    (tmp_path / "photos/0.png").unlink()
    go_on(6)  # of a program that did not note the data yet


def test_workers_do_not_change_the_result(tmp_path: Path):
    train(tmp_path / "none", config())
    train(tmp_path / "two", config(num_workers=2))
    assert metrics(tmp_path / "none") == metrics(tmp_path / "two")


def test_the_stage_leaves_its_averages_in_the_system(tmp_path: Path):
    system = train(tmp_path, config())
    ema = load_ema(tmp_path)
    assert ema.keys() == {"second.weight", "second.bias"}
    assert torch.equal(system.second.weight, ema["second.weight"])
    last = load_file(tmp_path / "checkpoints/toy/step_000008/model.safetensors")
    assert not torch.equal(last["second.weight"], ema["second.weight"])


def test_a_finished_stage_is_not_trained_again(tmp_path: Path):
    first = train(tmp_path, config())
    before = metrics(tmp_path)
    again = train(tmp_path, config(), fail_at=1)
    assert metrics(tmp_path) == before
    assert torch.equal(first.second.weight, again.second.weight)


def test_bfloat16_changes_the_computation_but_not_the_weights_format(tmp_path: Path):
    train(tmp_path / "fp32", config())
    system = train(tmp_path / "bf16", config(precision="bf16"))
    assert system.second.weight.dtype == torch.float32
    one, other = metrics(tmp_path / "fp32")[0]["loss"], metrics(tmp_path / "bf16")[0]["loss"]
    assert one != other and one == pytest.approx(other, rel=0.02)


def test_more_steps_go_on_from_the_end(tmp_path: Path):
    train(tmp_path, config())
    train(tmp_path, config(max_steps=10))
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 11))


def test_non_finite_loss_stops_before_the_step(tmp_path: Path):
    with pytest.raises(UserError, match=r"step 2 of stage toy: loss part l1 is not finite .*picture_4.png"):
        train(tmp_path, config(checkpoint_every=1), nan_at=2)
    state = json.loads((tmp_path / "checkpoints/toy/step_000001/state.json").read_text())
    assert state["step"] == 1 and not (tmp_path / "checkpoints/toy/step_000002").exists()
    assert len(metrics(tmp_path)) == 1


def test_a_few_non_finite_steps_can_be_left_out_and_a_resume_between_them_is_exact(tmp_path: Path, caplog):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cfg = config(checkpoint_every=1, skip_nonfinite=2)
    train(whole, cfg, nan_at=[3, 4])
    lines = metrics(whole)
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 4]
    assert lines[2]["loss"] is None and lines[2]["mse"] > 0 and lines[2]["grad_norm"] is None
    assert "step 4 of stage toy: loss part l1 is not finite" in caplog.text and "left out (2 in a row)" in caplog.text
    notes = [json.loads(line) for line in (whole / "nonfinite.jsonl").read_text().splitlines()]
    assert [(note["step"], note["keys"]) for note in notes] == [(3, [8, 9, 10, 11]), (4, [12, 13, 14, 15])]
    assert notes[0]["files"] == [f"picture_{n}.png" for n in range(8, 12)]
    with pytest.raises(KilledError):
        train(cut, cfg, nan_at=[3, 4], fail_at=4)
    train(cut, cfg, nan_at=[3, 4])
    assert metrics(cut) == lines
    assert (cut / "nonfinite.jsonl").read_text() == (whole / "nonfinite.jsonl").read_text()
    before, after = (load_file(whole / f"checkpoints/toy/step_00000{n}/model.safetensors") for n in (7, 8))
    assert not torch.equal(before["second.weight"], after["second.weight"])


def test_left_out_steps_count_in_a_row_also_over_a_resume(tmp_path: Path):
    cfg = config(checkpoint_every=1, skip_nonfinite=1)
    train(tmp_path / "apart", cfg, nan_at=[2, 4])
    with pytest.raises(KilledError):
        train(tmp_path / "row", cfg, nan_at=[2, 3], fail_at=3)
    with pytest.raises(UserError, match="step 3 of stage toy.*stopped before the optimizer step"):
        train(tmp_path / "row", cfg, nan_at=[2, 3])


def test_left_out_steps_leave_weights_averages_and_optimizer_alone(tmp_path: Path):
    train(tmp_path, config(checkpoint_every=1, keep_last=9, skip_nonfinite=1), nan_at=3)
    for name in ("model", "ema", "optimizer"):
        two, three = (load_file(tmp_path / f"checkpoints/toy/step_00000{n}/{name}.safetensors") for n in (2, 3))
        assert all(torch.equal(two[key], three[key]) for key in two), name


def test_a_picture_that_breaks_during_a_run_does_not_end_it(tmp_path: Path, caplog):
    for number in range(30):
        save_image(tmp_path / "photos" / f"{number:02d}.png", torch.rand(3, 8, 8))
    photos = PhotoCrops(str(tmp_path / "photos"), 4, None, seed=0)
    broken = [tmp_path / "photos" / f"{photos.order[n]:02d}.png" for n in (9, 21)]
    broken[0].write_bytes(broken[0].read_bytes()[:40])
    broken[1].unlink()
    photos.store.items += photos.store.items[:20]  # two broken ones of fifty are few
    runs = []
    for workers in (0, 1):
        torch.manual_seed(5)
        task = ToyTask(ToySystem())
        run = Run(tmp_path / f"run{workers}", make_accelerator("cpu"))
        fit(task, photos, config(num_workers=workers), ADAMW, run)
        runs.append(metrics(run.run_dir))
    assert len(runs[0]) == 8 and runs[0] == runs[1]
    warnings = [line for line in caplog.text.splitlines() if "skipping a broken image" in line]
    assert [str(path) in line for path, line in zip(broken, warnings, strict=True)] == [True, True]


def test_speed_memory_and_utilization_are_measured(tmp_path: Path, monkeypatch):
    logger = KeptNumbers()
    monkeypatch.setattr(stage, "_peak_flops", lambda device: 1e12)
    torch.manual_seed(5)
    task = ToyTask(ToySystem())
    task.name = "toy"
    run = Run(tmp_path, make_accelerator("cpu"), seed=1, logger=logger)
    fit(task, ToyPairs(), config(accumulate=2), ADAMW, run)
    assert len(logger.numbers) == 8
    for values in logger.numbers:
        assert values["images_per_second"] > 0 and values["memory_gb"] > 0.01
    # per picture two 1x1 convolutions from 3 to 3 channels, forward; of the backward pass the second one's weight and
    # what it reads, but nothing of the first, which is frozen and first
    flops = 4 * 16 * (2 * 2 * 3 * 3 + 2 * 3 * 3)
    rates = [values["mfu"] / values["images_per_second"] for values in logger.numbers]
    assert rates == [pytest.approx(flops / 4 / 1e12)] * 8
    plain = tmp_path / "plain"
    train(plain, config(accumulate=2))
    assert [line["loss"] for line in metrics(plain)] == [line["loss"] for line in metrics(tmp_path)]


class KeptNumbers(Logger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.numbers: list[dict] = []

    def log_metrics(self, stage: str, step: int, values: dict) -> None:
        self.numbers.append(dict(values))


def test_a_signal_saves_after_the_step_and_the_resume_is_exact(tmp_path: Path, capfd):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole, config(keep_last=9))
    run = Run(stopped, make_accelerator("cpu"), seed=1)
    torch.manual_seed(5)
    task = ToyTask(ToySystem(), signal_at=5)
    task.name = "toy"
    before = signal.getsignal(signal.SIGUSR1)
    with run.stop.listening(), pytest.raises(StoppedError, match="by SIGUSR1 after step 5 of stage toy.*step_000005"):
        fit(task, ToyPairs(), config(), ADAMW, run)
    assert signal.getsignal(signal.SIGUSR1) == before
    assert run.stop.exit_status == 138 and "SIGUSR1: saving a checkpoint" in capfd.readouterr().err
    assert len(metrics(stopped)) == 5
    train(stopped, config())
    assert metrics(stopped) == metrics(whole)


class SleepyPairs(ToyPairs):
    """Pairs whose worker does nothing any more from sample 12 on."""

    def __getitem__(self, n: int) -> dict:
        if n >= 12 and get_worker_info():
            time.sleep(600)
        return super().__getitem__(n)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_signal_is_heeded_while_the_data_workers_give_nothing(tmp_path: Path, monkeypatch, resumed: bool):
    def signal_after_three_steps(self) -> bool:
        if (tmp_path / "metrics.jsonl").exists() and len(metrics(tmp_path)) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return False

    monkeypatch.setattr(data_workers, "POLL", 0.2)
    monkeypatch.setattr(data_workers._Patience, "is_over", signal_after_three_steps)
    cfg = config(num_workers=1, checkpoint_every=100)
    for _ in range(1 + resumed):
        run = Run(tmp_path, make_accelerator("cpu"), seed=1)
        torch.manual_seed(5)
        task = ToyTask(ToySystem())
        task.name = "toy"
        with run.stop.listening(), pytest.raises(StoppedError, match="by SIGUSR1 after step 3 of stage toy") as stopped:
            fit(task, SleepyPairs(), cfg, ADAMW, run)
        assert "step_000003" in str(stopped.value) or resumed
    assert ("nothing new to save" in str(stopped.value)) == resumed
    train(tmp_path, config())
    train(tmp_path / "whole", config())
    assert metrics(tmp_path) == metrics(tmp_path / "whole")


def test_the_same_signal_a_second_time_ends_the_process_at_once():
    code = """
import os, signal, time
from varestorer.training import stopping
stopping.ECHO_SECONDS = 0.2
with stopping.StopRequest().listening():
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):  # an echo, and another signal: not a second time
        os.kill(os.getpid(), number)
    time.sleep(0.4)
    print("here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM and done.stdout == "here\n"


def test_a_launcher_s_own_handler_is_called_after_saving():
    asked = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(number))
    try:
        stop = StopRequest()
        with stop.listening():
            os.kill(os.getpid(), signal.SIGUSR2)
            assert asked == []
            stop.pass_on()
        assert asked == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_validation_scores_the_averages_on_held_out_pairs_and_changes_nothing(tmp_path: Path):
    train(tmp_path / "without", config())
    held_out = [collate([ToyPairs(9)[n] for n in numbers]) for numbers in ((0, 1, 2), (3,))]
    torch.manual_seed(5)
    system = ToySystem()
    task = ToyTask(system)
    task.name = "toy"
    cfg = config(validate_every=3)
    fit(task, ToyPairs(), cfg, ADAMW, Run(tmp_path / "with", make_accelerator("cpu"), seed=1), validation=held_out)
    lines = metrics(tmp_path / "with")
    assert [line["step"] for line in lines if "val/mse" in line] == [3, 6, 8]
    plain = [{key: value for key, value in line.items() if not key.startswith("val/")} for line in lines]
    assert plain == metrics(tmp_path / "without")
    batch = collate([ToyPairs(9)[n] for n in range(4)])
    with torch.no_grad():
        expected = (system(batch["lq"]) - batch["hq"]).square().mean().item()
    assert lines[-1]["val/mse"] == pytest.approx(expected)


def test_non_finite_gradient_names_the_parameter(tmp_path: Path):
    class Root(ToyTask):
        def forward(self, batch, step):
            zero = (self.system.second.bias * 0).sum()
            return {"loss": super().forward(batch, step)["loss"].detach() + zero.sqrt()}

    system = ToySystem()
    before = system.second.bias.clone()
    with pytest.raises(UserError, match=r"gradient of second.bias is not finite.*picture_0.png"):
        fit(Root(system), ToyPairs(), config(), ADAMW, Run(tmp_path, make_accelerator("cpu")))
    assert torch.equal(system.second.bias, before)


def test_samples_show_a_row_per_picture_and_a_column_per_entry(tmp_path: Path):
    train(tmp_path, config(sample_every=4), preview=True)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["toy_000004.png", "toy_000008.png"]
    picture = Image.open(tmp_path / "samples/toy_000008.png")
    assert picture.size == (3 * 4 + 4 * 2, 2 * 4 + 3 * 2)  # 4 pixels each, 2 between


def test_average_follows_its_formula():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = Ema({"w": weight}, decay=0.3)
    for step in (1, 2, 3):
        weight.data.fill_(float(step))
        ema.update(step)
    first = (1 - 2 / 11) * 1.0
    second = 3 / 12 * first + (1 - 3 / 12) * 2.0
    assert ema.averages["w"].item() == pytest.approx(0.3 * second + 0.7 * 3.0)
    with ema.in_place():
        assert weight.item() == pytest.approx(ema.averages["w"].item())
    assert weight.item() == 3.0


def test_decay_leaves_biases_alone_and_nothing_to_train_is_an_error():
    task = ToyTask(ToySystem())
    decayed, others = build_optimizer(task, ADAMW).param_groups
    assert [p.ndim for p in decayed["params"]] == [4] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in others["params"]] == [1] and others["weight_decay"] == 0.0
    task.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter trains"):
        build_optimizer(task, ADAMW)


class MarkedPairs(ToyPairs):
    """Leaves a file with the name of each process that made a sample."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __getitem__(self, n: int) -> dict:
        (self.folder / f"{n}_{os.getpid()}").touch()
        return super().__getitem__(n)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers cannot tell who sent a signal")
def test_data_workers_outlive_a_signal_to_the_whole_job_and_end_with_their_stage(tmp_path: Path):
    class Task(ToyTask):
        def forward(self, batch, step):
            if step == 2:
                pids = {path.name.split("_")[1] for path in tmp_path.glob("*_*")}
                subprocess.run(["kill", "-TERM", *pids], check=True)  # not sent by this process
                time.sleep(0.2)
            return super().forward(batch, step)

    run = Run(tmp_path / "run", make_accelerator("cpu"))
    fit(Task(ToySystem()), MarkedPairs(tmp_path), config(num_workers=2), ADAMW, run)
    assert len(metrics(run.run_dir)) == 8
    workers = {int(path.name.split("_")[1]) for path in tmp_path.glob("*_*")}
    assert len(workers) == 2
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers keep the usual handling")
def test_a_data_worker_still_ends_when_its_own_process_says_so():
    process = multiprocessing.get_context("fork").Process(target=idle_worker, daemon=True)
    process.start()
    time.sleep(0.3)
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)  # somebody else says so
    process.join(0.3)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert process.exitcode == 0


def idle_worker() -> None:
    leave_signals_to_parent(0)
    time.sleep(60)


SGD = partial(torch.optim.SGD, lr=0.5)
NAMES = ("second.weight", "second.bias")


def plain(**changes: object) -> TrainerConfig:
    """Every step is kept, and is the gradient times a constant learning rate."""
    values = {"warmup_steps": 0, "schedule": "constant", "checkpoint_every": 1, "keep_last": 99, "max_steps": 4}
    return config(**{**values, **changes})


def descend(folder: Path, cfg: TrainerConfig, **options: object) -> dict[str, Tensor]:
    """One stage by plain gradient descent; returns the weights it began with."""
    torch.manual_seed(5)
    task = ToyTask(ToySystem(), dropout=0)  # which draws other numbers for other shapes
    task.name = "toy"
    start = {name: parameter.detach().clone() for name, parameter in task.trainable_parameters().items()}
    fit(task, ToyPairs(), cfg, SGD, Run(folder, make_accelerator("cpu"), seed=1), **options)  # type: ignore[arg-type]
    return start


def saved(folder: Path, step: int, name: str = "model") -> dict[str, Tensor]:
    return read_tensors(folder / f"checkpoints/toy/step_{step:06d}/{name}.safetensors")


def length(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return math.sqrt(sum((after[name] - before[name]).square().sum().item() for name in NAMES))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_as_long_as_the_clipped_gradient(tmp_path: Path, accumulate: int) -> None:
    descend(tmp_path / "free", plain(clip_norm=None, accumulate=accumulate))
    norms = [line["grad_norm"] for line in metrics(tmp_path / "free")]
    assert length(saved(tmp_path / "free", 1), saved(tmp_path / "free", 2)) == pytest.approx(0.5 * norms[1], rel=1e-4)
    for share in (0.1, 0.9, 1.1):
        folder = tmp_path / str(share)
        start = descend(folder, plain(clip_norm=share * norms[0], accumulate=accumulate, max_steps=1))
        assert metrics(folder)[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-5)  # before clipping
        assert length(start, saved(folder, 1)) == pytest.approx(0.5 * min(share, 1) * norms[0], rel=1e-4)


def test_accumulation_changes_no_norm_and_no_step(tmp_path: Path) -> None:
    for accumulate in (1, 2, 4):
        descend(tmp_path / str(accumulate), plain(accumulate=accumulate))
    for accumulate in (2, 4):
        for one, other in zip(metrics(tmp_path / "1"), metrics(tmp_path / str(accumulate)), strict=True):
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        one, other = (saved(tmp_path / str(count), 4) for count in (1, accumulate))
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in NAMES)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_averages_follow_the_weights_after_each_step(tmp_path: Path, decay: float) -> None:
    """a <- d a + (1 - d) w with d = min(decay, (1 + step) / (10 + step)), from the weights of the start."""
    average = descend(tmp_path, plain(ema_decay=decay))
    for step in range(1, 5):
        d, weights = min(decay, (1 + step) / (10 + step)), saved(tmp_path, step)
        average = {name: d * average[name] + (1 - d) * weights[name] for name in NAMES}
        kept = saved(tmp_path, step, "ema")
        assert all(torch.allclose(kept[name], average[name], atol=1e-7) for name in NAMES)


def test_the_cosine_begins_at_the_peak_after_the_warm_up_and_its_last_step_still_moves() -> None:
    cfg = config(max_steps=6, warmup_steps=2)
    wanted = [0.5, 1.0, *(0.5 + 0.5 * math.cos(math.pi * k / 4) for k in range(4))]
    assert [cfg.learning_rate_factor(step) for step in range(1, 7)] == pytest.approx(wanted)
    kept = config(max_steps=6, warmup_steps=2, final_lr_ratio=0.2).learning_rate_factor(6)
    assert kept == pytest.approx(0.2 + 0.8 * wanted[-1])


def test_held_out_batches_of_unequal_size_count_by_their_pictures(tmp_path: Path) -> None:
    batches = [collate([ToyPairs(9)[n] for n in numbers]) for numbers in (range(3), range(3, 4))]
    descend(tmp_path / "two", plain(validate_every=1, max_steps=1), validation=batches)
    descend(
        tmp_path / "one", plain(validate_every=1, max_steps=1), validation=[collate([ToyPairs(9)[n] for n in range(4)])]
    )
    two, one = (metrics(tmp_path / name)[0]["val/mse"] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-5)


def test_of_two_stages_that_train_the_same_tensors_the_later_one_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(5)
    system, run = ToySystem(), Run(tmp_path, make_accelerator("cpu"))
    ends = []
    for name in ("b_first", "a_second"):  # not the order of their names
        task = ToyTask(system)
        task.name = name
        fit(task, ToyPairs(), plain(), SGD, run)
        ends.append({key: value.clone() for key, value in system.state_dict().items() if key in NAMES})
    weights = load_run_weights(tmp_path)
    assert all(torch.equal(weights[name], ends[1][name]) for name in NAMES)
    assert not torch.equal(ends[0]["second.weight"], ends[1]["second.weight"])
    early = load_run_weights(tmp_path / "checkpoints/b_first/step_000004")
    assert all(torch.equal(early[name], ends[0][name]) for name in NAMES)
