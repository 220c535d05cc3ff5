"""Environments of others, played in messages, and certified from a file as a suite names them."""

import asyncio
import re
import warnings
from pathlib import Path

import pytest

from agentopd_envs.adapters.messages import MessageEpisode

PAGE = Path(__file__).resolve().parents[2] / "docs" / "environments.md"


@pytest.fixture
def play():
    """``play(env, task, turns)``: what the student was shown, and the verdict."""

    async def run(env, task, turns):
        episode = MessageEpisode(env, task)
        try:
            seen = list(await episode.open())
            for turn in turns:
                if not episode.done:
                    seen += await episode.act(turn.content, turn.tool_calls)
            return seen, await episode.verdict()
        finally:
            await episode.close()

    return lambda *args: asyncio.run(run(*args))


@pytest.fixture
def snippet():
    """``snippet(word)``: the one Python block of docs/environments.md that holds the word."""

    def find(word):
        (body,) = [body for body in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if word in body]
        return body

    return find


@pytest.fixture
def certified(tmp_path, monkeypatch):
    """``certified(source, name)``: the certificate of an environment that a file defines."""
    from agentopd.certify import skill_of, validate  # Brings torch, which no other test here needs.

    monkeypatch.setenv("AGENTOPD_CACHE", str(tmp_path / "cache"))

    def prove(source, name):
        file = tmp_path / "theirs.py"
        file.write_text(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return asyncio.run(validate(skill_of(f"{file}:{name}")))

    return prove
