"""Options of training: schema errors, the learning rate, and how a stage's options are put together."""

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from varestorer.commands.entry import compose
from varestorer.commands.train import stage_configs
from varestorer.training.config import TrainConfig, TrainerConfig
from varestorer.utils.errors import UsageError
from varestorer.utils.schema import typed


def composed(*overrides: str):
    """A training's config."""
    return compose("train", overrides)


def test_groups_compose_to_dataclasses():
    cfg = composed("trainer.precision=bf16", "trainer.clip_norm=null", "optimizer.lr=1e-3")
    config = typed(TrainerConfig, cfg.trainer)
    assert config.precision == "bf16" and config.clip_norm is None
    assert cfg.optimizer.lr == 1e-3 and cfg.optimizer._partial_ is True


@pytest.mark.parametrize(
    "override",
    ["trainer.max_step=3", "trainer.max_steps=many", "optimizer.betas=x"],
)
def test_unknown_key_or_wrong_type_fails_at_compose(override: str):
    with pytest.raises(HydraException):
        composed(override)


def test_a_key_that_was_forced_in_is_refused_too():
    with pytest.raises(OmegaConfBaseException, match="'new' not in 'TrainerConfig'"):
        typed(TrainerConfig, composed("+trainer.new=1").trainer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0}, "trainer.max_steps must be at least 1, got trainer.max_steps=0"),
        ({"batch_size": 6, "accumulate": 4}, "multiple of trainer.accumulate=4, got 6"),
        ({"ema_decay": 1.0}, "trainer.ema_decay must be at least 0 and below 1"),
        ({"clip_norm": 0.0}, "trainer.clip_norm must be above 0"),
        ({"precision": "fp8"}, "trainer.precision must be one of auto, fp32, bf16, got trainer.precision=fp8"),
    ],
)
def test_impossible_values(values: dict, message: str):
    with pytest.raises(UsageError, match=message):
        TrainerConfig(**values)


def test_learning_rate_warms_up_then_falls_as_a_cosine():
    config = TrainerConfig(max_steps=10, warmup_steps=2, final_lr_ratio=0.1)
    assert config.learning_rate_factor(1) == 0.5
    assert config.learning_rate_factor(2) == config.learning_rate_factor(3) == 1.0
    assert config.learning_rate_factor(7) == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < config.learning_rate_factor(10) < config.learning_rate_factor(9)
    assert config.learning_rate_factor(11) == pytest.approx(0.1)
    constant = TrainerConfig(max_steps=10, schedule="constant")
    assert [constant.learning_rate_factor(step) for step in (1, 10)] == [1.0, 1.0]


def staged(**stage):
    """A small composed config with one stage `s` beside a plain stage `t`."""
    values = {
        "optimizer": {"lr": 0.1},
        "data": {"crop": 32, "same": "${data.crop}"},
        "stages": {"s": {"task": {}, **stage}, "t": {"task": {}}},
    }
    return OmegaConf.merge(OmegaConf.structured(TrainConfig), values)


def test_stage_options_go_over_the_run_s():
    cfg = staged(trainer={"max_steps": 7}, optimizer={"lr": 0.5}, data={"crop": 8, "more": 1})
    configs = stage_configs(cfg, [])
    assert (configs["s"].trainer.max_steps, configs["s"].optimizer.lr) == (7, 0.5)
    assert configs["s"].data == {"crop": 8, "same": 8, "more": 1}
    assert (configs["t"].trainer.max_steps, configs["t"].optimizer.lr, configs["t"].data.same) == (1000, 0.1, 32)
    assert cfg.trainer.max_steps == 1000


def test_command_line_goes_over_the_stage_s_options():
    cfg = staged(trainer={"max_steps": 7, "batch_size": 2})
    cfg.trainer.max_steps = 3
    configs = stage_configs(cfg, ["trainer.max_steps=3", "seed=1"])
    assert [config.trainer.max_steps for config in configs.values()] == [3, 3]
    assert configs["s"].trainer.batch_size == 2
    both = stage_configs(cfg, ["trainer.max_steps=3", "stages.s.trainer.max_steps=7"])
    assert [config.trainer.max_steps for config in both.values()] == [7, 3]


def test_stage_with_an_unknown_or_impossible_option():
    with pytest.raises(OmegaConfBaseException):
        stage_configs(staged(trainer={"max_step": 7}), [])
    with pytest.raises(UsageError, match="max_steps must be at least 1"):
        stage_configs(staged(trainer={"max_steps": -7}), [])
    with pytest.raises(UsageError, match="no stages"):
        stage_configs(OmegaConf.structured(TrainConfig), [])
