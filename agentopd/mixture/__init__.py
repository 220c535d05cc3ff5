"""What goes into each batch: new skills by weight, old skills replayed on-policy."""

from agentopd.mixture.decontamination import Decontaminator, Overlap, sentence_embedder
from agentopd.mixture.replay import ReplayScores, replay_weights
from agentopd.mixture.suite import Drawn, Mixture, MixtureState, TaskStream

__all__ = [
    "Decontaminator",
    "Drawn",
    "Mixture",
    "MixtureState",
    "Overlap",
    "ReplayScores",
    "TaskStream",
    "replay_weights",
    "sentence_embedder",
]
