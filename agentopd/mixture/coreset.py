"""Which old tasks to replay: a diverse few near the new prompts, by sentence embeddings.

Selection is maximal marginal relevance (Carbonell & Goldstein 1998): each pick is the task with the largest
``nearness * sim(task, nearest new prompt) - (1 - nearness) * sim(task, nearest pick so far)``, cosine similarities
throughout. The tasks are chosen once; their episodes are sampled anew from the current student every time.

Shapes: C candidates, P new prompts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agentopd.config.retention import CoresetConfig
from agentopd.mixture.embedding import Embed, Floats
from agentopd.types import Task


def choose_tasks(candidates: Sequence[Task], new: Sequence[Task], embed: Embed, config: CoresetConfig) -> list[Task]:
    """Up to ``config.size`` of the candidates."""
    vectors_CD, new_PD = embed([prompt_text(task) for task in candidates]), embed([prompt_text(task) for task in new])
    return [candidates[index] for index in marginal_relevance(vectors_CD, new_PD, config.size, config.nearness)]


def marginal_relevance(vectors_CD: Floats, new_PD: Floats, size: int, nearness: float) -> list[int]:
    """Indices of up to ``size`` rows of ``vectors_CD``, in the order they were picked; ties go to the first row."""
    near_C = (vectors_CD @ new_PD.T).max(axis=1)
    taken_C = np.zeros(len(vectors_CD), dtype=bool)
    closest_C = np.full(len(vectors_CD), -1.0, dtype=np.float32)
    chosen: list[int] = []
    for _ in range(min(size, len(vectors_CD))):
        score_C = nearness * near_C - (1 - nearness) * closest_C
        score_C[taken_C] = -np.inf
        pick = int(score_C.argmax())
        chosen.append(pick)
        taken_C[pick] = True
        closest_C = np.maximum(closest_C, vectors_CD @ vectors_CD[pick])
    return chosen


def prompt_text(task: Task) -> str:
    """What the student is asked: the task's user messages."""
    return "\n".join(message.content for message in task.prompt if message.role == "user")
