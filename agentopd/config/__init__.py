"""Typed configuration: TOML in, frozen sections out, every unknown key an error."""

from agentopd.config.load import dump_toml, load_run_config, load_suite
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.presets import PRESETS, SUMMARIES
from agentopd.config.run import RunConfig, SkillConfig, SuiteConfig

__all__ = [
    "PRESETS",
    "SUMMARIES",
    "ObjectiveConfig",
    "RunConfig",
    "SkillConfig",
    "SuiteConfig",
    "dump_toml",
    "load_run_config",
    "load_suite",
]
