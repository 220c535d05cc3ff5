"""tau2-bench's mock domain: a board of tasks under a policy, and a user who says what the row says and no more.

Rows, database and policy are the benchmark's; its four tools are written here. The goal is the database after the
row's actions. What only a language model could judge is left out: one row, of whose criteria nothing else remains.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from agentopd.errors import TaskError, ToolError
from agentopd.registry import register_environment
from agentopd.types import JSON, Limits, Message, Privileged, Source, Split, Task, ToolCall
from agentopd_envs.authoring import TaskLoader, tool_turn
from agentopd_envs.conversation import ConversationEnvironment
from agentopd_envs.datasets.reading import Row, locate, select
from agentopd_envs.tools import tool

FOLDER = "tau2_mock"
LIMITS = Limits(max_turns=12, max_tokens=2048, max_tool_calls=16)
DONE = Message(role="assistant", content="Done.")


class Action(BaseModel):
    """A call of the solution; ``compare_args`` are the arguments that matter, None for all."""

    name: str
    arguments: JSON
    compare_args: list[str] | None = None


class Check(BaseModel):
    """A function call that sets up a task, or one that has to hold at its end, on either side's database."""

    env_type: Literal["assistant", "user"]
    func_name: str
    arguments: JSON


class Criteria(BaseModel):
    """What counts; without a ``reward_basis``, the database."""

    actions: list[Action] = []
    env_assertions: list[Check] = []
    reward_basis: list[str] = []


class Start(BaseModel):
    """What there is before the first turn, beside the database."""

    initialization_data: dict[str, JSON] = {}
    initialization_actions: list[Check] = []
    message_history: list[JSON] = []


class MockRow(Row):
    """One row of ``tasks.jsonl``."""

    user_scenario: JSON
    ticket: str | None = None
    initial_state: Start = Start()
    evaluation_criteria: Criteria


class Board:
    """Tasks by id and users who own them; ``notifications`` where the row is about the user's inbox too."""

    def __init__(self, db: JSON) -> None:
        self.db: JSON = copy.deepcopy(db)

    def create_task(self, user_id: str, title: str, description: str | None = None) -> JSON:
        """Add a pending task and give it to a user."""
        if user_id not in self.db["users"]:
            raise ToolError(f"User {user_id} not found")
        task_id = f"task_{len(self.db['tasks']) + 1}"
        made = {"task_id": task_id, "title": title, "description": description, "status": "pending"}
        self.db["tasks"][task_id] = made
        self.db["users"][user_id]["tasks"].append(task_id)
        return dict(made)

    def update_task_status(self, task_id: str, status: str) -> JSON:
        """Set the status of a task."""
        if task_id not in self.db["tasks"]:
            raise ToolError(f"Task {task_id} not found")
        self.db["tasks"][task_id]["status"] = status
        return dict(self.db["tasks"][task_id])

    def add_notification(self, notification_id: str, message: str, task_id: str | None = None) -> None:
        """Put a message into the user's inbox."""
        made = {"notification_id": notification_id, "message": message, "status": "unread", "task_id": task_id}
        self.db.setdefault("notifications", {})[notification_id] = made

    def dismiss(self) -> None:
        """What the user does when spoken to: dismiss the messages on tasks that are completed."""
        for note in self.db.get("notifications", {}).values():
            if self.db["tasks"].get(note["task_id"], {}).get("status") == "completed":
                note["status"] = "read"

    def run(self, name: str, arguments: JSON) -> None:
        """Carry out a call of a row; those that change nothing are skipped."""
        if name in ("create_task", "update_task_status", "add_notification"):
            getattr(self, name)(**arguments)


def tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """All rows that a database can judge, shuffled by ``seed``, ``limit`` of them at most; each split holds them."""
    db = json.loads(locate(f"{FOLDER}/db.json").read_text(encoding="utf-8"))
    policy = locate(f"{FOLDER}/policy.md").read_text(encoding="utf-8")
    rows = select(f"{FOLDER}/tasks.jsonl", MockRow, None, seed)
    judged = [row for row in rows if row.evaluation_criteria.actions or row.evaluation_criteria.env_assertions]
    return (_task(row, db, policy, split, seed) for row in judged[:limit])


def _task(row: MockRow, db: JSON, policy: str, split: Split, seed: int) -> Task:
    start, criteria = row.initial_state, row.evaluation_criteria
    board = Board(_merged(db, start.initialization_data.get("agent_data", {})))
    for action in start.initialization_actions:
        board.run(action.func_name, action.arguments)
    history = [_message(message) for message in start.message_history]
    for call in [call for message in history for call in message.tool_calls]:
        board.run(call.name, call.arguments)
    initial = copy.deepcopy(board.db)
    solution = [ToolCall(name=action.name, arguments=action.arguments) for action in criteria.actions]
    solution = solution or [_fulfilling(check) for check in criteria.env_assertions]
    for call in solution:
        board.run(call.name, call.arguments)
    board.dismiss()
    said = row.ticket or str(row.user_scenario["instructions"])
    required = criteria.actions if "ACTION" in criteria.reward_basis else []
    return Task(
        id=f"{FOLDER}/{row.id}",
        env="tau2_mock",
        split=split,
        prompt=(Message(role="system", content=policy), *history, Message(role="user", content=said)),
        public={"db": initial},
        hidden={"initial": initial, "goal": board.db, "required_calls": [_pattern(action) for action in required]},
        privileged=Privileged(
            hint="; ".join(f"{call.name} {call.arguments}" for call in solution),
            trajectory=(Message(role="assistant", tool_calls=tuple(solution)), DONE),
        ),
        limits=LIMITS,
        seed=seed,
        source=Source(dataset="tau2-bench mock", licence="MIT", row=row.id),
    )


def _merged(old: JSON, new: JSON) -> JSON:
    both = {key: _merged(old[key], value) for key, value in new.items() if isinstance(value, dict) and key in old}
    return {**old, **new, **both}


def _message(raw: JSON) -> Message:
    calls = tuple(ToolCall(name=call["name"], arguments=call["arguments"]) for call in raw.get("tool_calls") or ())
    return Message(role=raw["role"], content=raw.get("content") or "", tool_calls=calls)


def _fulfilling(check: Check) -> ToolCall:
    """The call that makes an assertion true, for a row that gives no actions."""
    if check.func_name != "assert_task_status":
        raise TaskError(f"no call is known that makes {check.func_name!r} true")
    wanted = {"task_id": check.arguments["task_id"], "status": check.arguments["expected_status"]}
    return ToolCall(name="update_task_status", arguments=wanted)


def _pattern(action: Action) -> JSON:
    names = action.arguments if action.compare_args is None else action.compare_args
    return {"name": action.name, "arguments": {name: action.arguments[name] for name in names}}


@register_environment("tau2_mock")
class Tau2MockEnvironment(ConversationEnvironment):
    """tau2-bench's mock domain: a board of tasks, a policy, one request."""

    name = "tau2_mock"
    verifier = "state"
    loaders: ClassVar[dict[str, TaskLoader]] = {"tau2": tasks}
    sources = tuple(loaders)
    chance = 0.3
    """Four tools and two statuses: random calls meet some of the rows, and all of that which asks for a transfer."""

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """Only look."""
        return tool_turn("get_users"), DONE

    @classmethod
    def wrong_turns(cls, task: Task) -> Iterator[tuple[Message, ...]]:
        """Success claimed without a call; a task created that nobody asked for."""
        yield (DONE,)
        yield (tool_turn("create_task", user_id="user_1", title="Something else"), *task.privileged.trajectory)

    def setup(self) -> None:
        """The board of the row."""
        self._board = Board(self.task.public["db"])

    @tool(mutates=True)
    def create_task(self, user_id: str, title: str, description: str | None = None) -> Any:
        """Create a new task for a user. Args: user_id: who creates it; title: its title; description: optional."""
        return self._board.create_task(user_id, title, description)

    @tool
    def get_users(self) -> Any:
        """Get all users in the database."""
        return list(self._board.db["users"].values())

    @tool(mutates=True)
    def update_task_status(self, task_id: str, status: Literal["pending", "completed"]) -> Any:
        """Update the status of a task. Args: task_id: the task; status: the new status."""
        return self._board.update_task_status(task_id, status)

    @tool
    def transfer_to_human_agents(self, summary: str) -> str:
        """Transfer the user to a human, if they ask for it or nothing else can be done. Args: summary: their issue."""
        return "Transfer successful"

    def yielded(self) -> None:
        """The user sees to their inbox."""
        self._board.dismiss()

    def state(self) -> JSON:
        """The board."""
        return {"db": copy.deepcopy(self._board.db)}
