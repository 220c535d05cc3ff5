"""How tool calls are written in text, one module per way, and how what a student wrote is read back."""

from agentopd.rendering.codecs.base import ToolCodec, call_spans
from agentopd.rendering.codecs.hermes import HermesJSON
from agentopd.rendering.codecs.openai import OpenAI
from agentopd.rendering.codecs.pythonic import Pythonic
from agentopd.rendering.codecs.qwen3_xml import Qwen3XML

__all__ = ["HermesJSON", "OpenAI", "Pythonic", "Qwen3XML", "ToolCodec", "call_spans"]
