"""What a roll-back does to what is known of the old skills."""

from types import SimpleNamespace

from agentopd.mixture import Action, MixtureState
from agentopd.mixture.replay import ReplayScores
from agentopd.reaction import _apply


def test_a_roll_back_behind_the_end_of_a_stage_keeps_the_first_score_of_what_it_taught():
    then = MixtureState(base={"math": 0.9}, current={"math": 0.88}, errors={"math": 0.01})
    known = ReplayScores(base={"math": 0.9, "repair": 0.75}, current={"math": 0.7, "repair": 0.75})
    run = SimpleNamespace(mixture=SimpleNamespace(scores=known), roll_back=lambda step: then)
    _apply(run, Action(step=80, action="roll_back", skill="math", drop=0.2, before=80, after=40))
    scores = run.mixture.scores
    assert scores.base == {"math": 0.9, "repair": 0.75} and scores.current == {"math": 0.88}
    scores.update({"math": 0.9, "repair": 0.45})
    assert scores.loss("repair") == 0.3
