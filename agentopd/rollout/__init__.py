"""Episodes: the student (or a script) acting in environments, token in, token out."""

from agentopd.rollout.episode import EpisodeSpec, RolloutOptions
from agentopd.rollout.runner import run_episodes, stream_episodes
from agentopd.rollout.scripted import run_scripted

__all__ = ["EpisodeSpec", "RolloutOptions", "run_episodes", "run_scripted", "stream_episodes"]
