"""What goes into each batch: new skills by weight, old skills replayed on-policy; and what is done to keep them."""

from agentopd.mixture.coreset import choose_tasks
from agentopd.mixture.decontamination import Decontaminator, Overlap
from agentopd.mixture.embedding import load_embedder
from agentopd.mixture.guard import Action, GuardState, guard_actions
from agentopd.mixture.replay import ReplayScores, replay_weights
from agentopd.mixture.suite import CoresetStream, Drawn, Keep, Mixture, MixtureState, TaskStream, keep_all

__all__ = [
    "Action",
    "CoresetStream",
    "Decontaminator",
    "Drawn",
    "GuardState",
    "Keep",
    "Mixture",
    "MixtureState",
    "Overlap",
    "ReplayScores",
    "TaskStream",
    "choose_tasks",
    "guard_actions",
    "keep_all",
    "load_embedder",
    "replay_weights",
]
