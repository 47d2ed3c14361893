"""Chat models, and the builder of completions. Importing it loads no client library."""

from __future__ import annotations

from featurekit_spark.llm.base import ChatModel, Completion
from featurekit_spark.llm.completion import LIST_INSTRUCTION, LLMCompletion
from featurekit_spark.llm.offline import OFFLINE_NOTICE, OfflineLLM
from featurekit_spark.llm.openai import OpenAIChat

__all__ = [
    "LIST_INSTRUCTION",
    "OFFLINE_NOTICE",
    "ChatModel",
    "Completion",
    "LLMCompletion",
    "OfflineLLM",
    "OpenAIChat",
]
