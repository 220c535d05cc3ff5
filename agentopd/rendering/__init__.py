"""Messages to token ids and back: chat templates and tool-call codecs."""

from agentopd.rendering.codecs import HermesJSON, OpenAI, Pythonic, Qwen3XML, ToolCodec
from agentopd.rendering.templates import ChatRenderer, TokenClass, assistant_text

__all__ = [
    "ChatRenderer",
    "HermesJSON",
    "OpenAI",
    "Pythonic",
    "Qwen3XML",
    "TokenClass",
    "ToolCodec",
    "assistant_text",
]
