"""The help desk: what the shop does to its tables, and what the policy makes of a conversation."""

import pytest

from agentopd.errors import ToolError
from agentopd.types import Message
from agentopd_envs import tool_turn
from agentopd_envs.retail.environment import RetailEnvironment
from agentopd_envs.retail.shop import Shop

DONE = Message(role="assistant", content="Done.")
TABLES = {
    "customers": {"C1": {"customer_id": "C1", "name": "Ann", "email": "ann@example.org", "gift_cents": 100}},
    "stock": {
        "I1": {"item_id": "I1", "product": "lamp", "option": "red", "price_cents": 900, "available": 0},
        "I2": {"item_id": "I2", "product": "lamp", "option": "blue", "price_cents": 1200, "available": 1},
    },
    "orders": {
        "W1": {"order_id": "W1", "customer_id": "C1", "status": "pending", "delivered_on": None, "address": "1 Elm Row",
               "paid_with": "gift card", "reason": None, "note": None},
    },
    "lines": {
        "L1": {"line_id": "L1", "order_id": "W1", "item_id": "I1", "state": "ordered"},
        "L2": {"line_id": "L2", "order_id": "W1", "item_id": "I2", "state": "ordered"},
    },
}  # fmt: skip


@pytest.fixture
def shop():
    made = Shop(TABLES)
    yield made
    made.close()
    made.close()


def test_tables_come_out_as_they_went_in(shop):
    assert shop.tables() == {**TABLES, "refunds": {}}
    assert shop.customer(" Ann@example.org ")["orders"] == ["W1"]
    assert [line["product"] for line in shop.order("W1")["lines"]] == ["lamp", "lamp"]


def test_cancelling_restocks_and_refunds_to_what_it_was_paid_with(shop):
    assert shop.cancel("W1", "mistake") == 2100
    tables = shop.tables()
    assert (tables["orders"]["W1"]["status"], tables["orders"]["W1"]["reason"]) == ("cancelled", "mistake")
    assert [row["available"] for row in tables["stock"].values()] == [1, 2]
    assert tables["customers"]["C1"]["gift_cents"] == 2200
    assert tables["refunds"] == {"R1": {"refund_id": "R1", "order_id": "W1", "cents": 2100, "paid_to": "gift card"}}
    with pytest.raises(ToolError, match="cancelled already"):
        shop.cancel("W1", "mistake")


def test_an_exchange_swaps_stock_and_settles_the_difference(shop):
    assert shop.exchange("W1", "L1", "I2") == -300
    tables = shop.tables()
    assert tables["lines"]["L1"] == {"line_id": "L1", "order_id": "W1", "item_id": "I2", "state": "exchanged"}
    assert [row["available"] for row in tables["stock"].values()] == [1, 0]
    assert tables["customers"]["C1"]["gift_cents"] == -200
    with pytest.raises(ToolError, match="not in stock"):
        shop.exchange("W1", "L2", "I2")
    with pytest.raises(ToolError, match="no open line 'L1'"):
        shop.take_back("W1", "L1")


def test_what_does_not_exist_is_told(shop):
    for call in (lambda: shop.order("W9"), lambda: shop.customer("x"), lambda: shop.options("car"),
                 lambda: shop.order("W1' OR '1'='1")):  # fmt: skip
        with pytest.raises(ToolError, match="no "):
            call()


# --- the conversations -----------------------------------------------------------------------------------------------


def test_forty_tasks_and_their_solutions(outcome):
    tasks = list(RetailEnvironment.load_tasks("train", "micro", 40, 0))
    assert len({task.hash for task in tasks}) == 40
    assert {len(task.public["user_turns"]) for task in tasks} == {0, 1, 2}
    for task in tasks[:4]:
        assert outcome(RetailEnvironment, task, RetailEnvironment.gold_turns(task)) == 1.0
        for less in ([Message(role="assistant")], RetailEnvironment.starter_turns(task)):
            assert outcome(RetailEnvironment, task, less) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("split", "count"), [("train", 20), ("eval", 5), ("retention", 5)])
def test_every_split_is_solved_by_gold_alone(split, count, outcome):
    for task in RetailEnvironment.load_tasks(split, "micro", count, 1):
        assert outcome(RetailEnvironment, task, RetailEnvironment.gold_turns(task)) == 1.0
        assert [outcome(RetailEnvironment, task, turns) for turns in RetailEnvironment.wrong_turns(task)] == [0.0] * 5


def one(handed_over):
    """A task that ends with a human, or one with a friend's order."""
    for task in RetailEnvironment.load_tasks("train", "micro", 40, 0):
        said = task.public["user_turns"][-1:] or [""]
        if bool(task.hidden["required_calls"]) if handed_over else "friend" in said[0]:
            return task


def test_what_the_rules_do_not_allow_goes_to_a_human_and_ends_the_conversation(play, outcome):
    task = one(handed_over=True)
    gold = RetailEnvironment.gold_turns(task)
    assert outcome(RetailEnvironment, task, gold) == 1.0
    assert len(play(RetailEnvironment, task, [*gold, DONE]).episode.turns) == len(gold) - 1
    kept = [turn for turn in gold if not any(call.name == "transfer_to_human" for call in turn.tool_calls)]
    assert outcome(RetailEnvironment, task, kept) == 0.0


def test_handing_over_what_could_be_done_is_no_solution(outcome):
    task = one(handed_over=False)
    gold = RetailEnvironment.gold_turns(task)
    assert outcome(RetailEnvironment, task, [*gold[:-1], tool_turn("transfer_to_human", summary="help")]) == 0.0


def test_harder_tasks_have_more_requests():
    tasks = list(RetailEnvironment.load_tasks("train", "micro", 30, 0))
    ranked = sorted(tasks, key=RetailEnvironment.difficulty)
    turns = [len(task.public["user_turns"]) for task in ranked]
    assert turns == sorted(turns)
