"""The help desk as an environment: tools over the shop, a user who follows a script, the ``state`` verifier."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal

from agentopd.registry import register_environment
from agentopd.types import JSON, Message, Task
from agentopd_envs.authoring import tool_turn
from agentopd_envs.conversation import ConversationEnvironment
from agentopd_envs.retail import tasks
from agentopd_envs.retail.shop import Shop
from agentopd_envs.tools import tool


@register_environment("retail")
class RetailEnvironment(ConversationEnvironment):
    """Endless help-desk conversations over a database, under a policy that the tools do not enforce."""

    name = "retail"
    verifier = "state"

    @classmethod
    def generate(cls, rng: random.Random) -> Task:
        """A shop of its own, and one to three requests."""
        return tasks.draw(rng, cls.name)

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """Only look the customer up."""
        email = next(iter(task.public["tables"]["customers"].values()))["email"]
        closing = Message(role="assistant", content="Done.")
        return (tool_turn("find_customer", email=email), *(closing for _ in range(len(task.public["user_turns"]) + 1)))

    @classmethod
    def wrong_turns(cls, task: Task) -> Iterable[tuple[Message, ...]]:
        """Claims without calls, a request left out, the policy ignored."""
        return tasks.wrong_turns(task)

    @classmethod
    def difficulty(cls, task: Task) -> float:
        """Requests, and the calls it takes to grant them."""
        calls = sum(len(turn.tool_calls) for turn in cls.gold_turns(task))
        return 10.0 * (1 + len(task.public["user_turns"])) + calls

    def setup(self) -> None:
        """Open the shop."""
        self._shop = Shop(self.task.public["tables"])

    async def close(self) -> None:
        """Close the shop."""
        if hasattr(self, "_shop"):
            self._shop.close()

    @tool
    def find_customer(self, email: str) -> JSON:
        """Look up a customer and the numbers of their orders. Args: email: the e-mail address."""
        return self._shop.customer(email)

    @tool
    def get_order(self, order_id: str) -> JSON:
        """Look up an order, its lines and their items. Args: order_id: such as W1230."""
        return self._shop.order(order_id)

    @tool
    def get_product(self, product: str) -> list[JSON]:
        """Look up the options of a product, their prices in cents and what is in stock. Args: product: its name."""
        return self._shop.options(product)

    @tool(mutates=True)
    def cancel_order(self, order_id: str, reason: Literal["unneeded", "mistake"]) -> str:
        """Cancel an order and refund it. Args: order_id: the order; reason: why."""
        return f"cancelled; {self._shop.cancel(order_id, reason)} cents go back to what it was paid with"

    @tool(mutates=True)
    def change_address(self, order_id: str, address: str) -> None:
        """Send an order elsewhere. Args: order_id: the order; address: number and street."""
        self._shop.readdress(order_id, address)

    @tool(mutates=True)
    def return_item(self, order_id: str, line_id: str) -> str:
        """Take one item back and refund it. Args: order_id: the order; line_id: its line, such as L3."""
        return f"returned; {self._shop.take_back(order_id, line_id)} cents go back to what it was paid with"

    @tool(mutates=True)
    def exchange_item(self, order_id: str, line_id: str, item_id: str) -> str:
        """Swap one item for another. Args: order_id: the order; line_id: its line; item_id: the new item."""
        return f"exchanged; {self._shop.exchange(order_id, line_id, item_id)} cents are refunded (below 0: charged)"

    @tool(mutates=True)
    def transfer_to_human(self, summary: str) -> None:
        """Hand the conversation to a human; this ends it. Args: summary: what the customer wants."""
        self.finish()

    def state(self) -> JSON:
        """All tables."""
        return {"db": self._shop.tables()}
