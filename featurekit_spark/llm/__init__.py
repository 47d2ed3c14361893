"""Chat models, and the builder of completions. Importing it loads no client library."""

from __future__ import annotations

from featurekit_spark.llm.base import ChatModel, Completion, Message
from featurekit_spark.llm.completion import LIST_INSTRUCTION, LLMCompletion
from featurekit_spark.llm.offline import OFFLINE_NOTICE, OfflineLLM
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.llm.structured import StructuredCompletion

__all__ = [
    "LIST_INSTRUCTION",
    "OFFLINE_NOTICE",
    "ChatModel",
    "Completion",
    "LLMCompletion",
    "Message",
    "OfflineLLM",
    "OpenAIChat",
    "StructuredCompletion",
]
