"""What goes into each batch: new skills by weight, old skills replayed on-policy."""

from agentopd.mixture.replay import ReplayScores, replay_weights
from agentopd.mixture.suite import Drawn, Mixture, MixtureState, TaskStream

__all__ = ["Drawn", "Mixture", "MixtureState", "ReplayScores", "TaskStream", "replay_weights"]
