"""The built-in graph `chat`: a chat model through LangChain's `init_chat_model`, set up by the agent's config.

Needs the extra `llm`. A provider's key comes from the environment, as its package reads it, and a `base_url`
from the operator's list: a visitor's request can name neither.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from langchain.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import MessagesState, StateGraph
from langgraph.pregel import Pregel

MAX_MODELS = 100


class ChatConfig(msgspec.Struct, frozen=True):
    """The config of an agent on the graph `chat`. `model` is `<provider>:<name>`, as `init_chat_model` takes it."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    system_prompt: str = ""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    base_url: str | None = None


class ChatGraph:
    """Answers with a chat model. `base_urls` are the endpoints that agents may name."""

    def __init__(self, base_urls: Sequence[str]) -> None:
        self._base_urls = frozenset(base_urls)
        self._models: dict[ChatConfig, BaseChatModel] = {}

    def check(self, config: dict[str, Any]) -> ChatConfig:
        """The config, checked. Raises ValueError that names the field."""
        checked = msgspec.convert(config, ChatConfig)
        if checked.base_url is not None and checked.base_url not in self._base_urls:
            raise ValueError("base_url: not one that GATEWAY_MODEL_BASE_URLS allows")
        return checked

    def compile(self) -> Pregel[Any, Any, Any, Any]:
        """The compiled graph."""
        graph = StateGraph(MessagesState)
        graph.add_node("model", self._answer)
        graph.set_entry_point("model")
        return graph.compile()

    async def _answer(self, state: MessagesState, config: RunnableConfig) -> dict[str, list[BaseMessage]]:
        checked = self.check(config.get("configurable", {}))
        prompt: list[BaseMessage] = [SystemMessage(checked.system_prompt)] if checked.system_prompt else []
        # In LangGraph's streaming modes `ainvoke` streams too.
        answer = await self._model(checked).ainvoke([*prompt, *state["messages"]])
        if checked.model.startswith("openai:") and not answer.response_metadata.get("finish_reason"):
            # A connection that is cut looks like an end to the client: the text so far is not an answer.
            raise RuntimeError("the model's stream stopped before its end")
        return {"messages": [answer]}

    def _model(self, config: ChatConfig) -> BaseChatModel:
        model = self._models.get(config)
        if model is None:
            if len(self._models) >= MAX_MODELS:
                self._models.clear()
            options: dict[str, Any] = {}
            if config.temperature is not None:
                options["temperature"] = config.temperature
            if config.base_url is not None:
                options["base_url"] = config.base_url
            if config.model.startswith("openai:"):
                # With a base_url the package leaves the usage out of streams unless asked.
                options["stream_usage"] = True
            model = self._models[config] = init_chat_model(config.model, **options)
        return model
