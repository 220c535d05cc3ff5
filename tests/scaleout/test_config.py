"""The section [ray] is refused where it would do nothing, and where Ray is missing."""

import importlib.util
from pathlib import Path

import pytest
from pydantic import ValidationError

from agentopd.config import load_run_config
from agentopd.config.scaleout import RayConfig
from agentopd.errors import ConfigError
from agentopd.scaleout.pool import connect

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.toml"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "no worker is asked for"),
        ({"rollout_workers": 1, "verification_resource": "judge"}, "verification_resource has no effect"),
        ({"verification_workers": 1, "gpus_per_rollout_worker": 0.5}, "have no effect without rollout_workers"),
        ({"verification_workers": 1, "attempts": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_without_effect_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        RayConfig(**settings)


@pytest.mark.parametrize("engine", ["vllm", "vllm_servers"])
def test_rollout_workers_and_another_engine_are_refused_at_load(engine):
    with pytest.raises(ConfigError, match=rf"ray.rollout_workers are 'hf' engines, .* '{engine}'"):
        load_run_config(QUICKSTART, [f"rollout.engine={engine}", "ray.rollout_workers=1"])


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_error_says_what_to_install():
    with pytest.raises(ConfigError, match=r"pip install 'agentopd\[ray\]'"):
        connect(RayConfig(verification_workers=1))
