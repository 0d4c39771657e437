"""`-m hydra/launcher=slurm` composes to a job that is put in the queue again; needs varestorer[slurm]."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import varestorer.commands.train  # noqa: F401  # registers the schemas
from varestorer.training import parallel

pytestmark = pytest.mark.smoke
CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_slurm_launcher_resumes_and_takes_its_own_keys() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        words = ["hydra/launcher=slurm", "+experiment=smoke", "hydra.launcher.partition=gpu"]
        cfg = compose("train", words, return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert launcher.partition == "gpu"
    assert launcher.max_num_timeout > 0
    assert launcher.signal_delay_s >= 60


def test_a_process_outside_of_a_cluster_joins_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    parallel.join_cluster_job()
    assert not parallel.in_cluster_job()


def test_tasks_of_a_cluster_job_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    job = {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_NTASKS": "2", "LOCAL_JOB_NUM_NODES": "1"}
    job |= {"LOCAL_NODEID": "0", "LOCAL_GLOBALID": "1", "LOCAL_LOCALID": "1"}
    for key, value in job.items():
        monkeypatch.setenv(f"SUBMITIT_{key}", value)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    parallel.join_cluster_job()
    assert (parallel.os.environ["RANK"], parallel.os.environ["WORLD_SIZE"]) == ("1", "2")
