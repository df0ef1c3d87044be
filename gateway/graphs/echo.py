"""The built-in graph `echo`: no model, for demos and tests."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, TypedDict

import msgspec
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel


class EchoState(TypedDict, total=False):
    """The part of a run's state that `echo` uses."""

    messages: list[AnyMessage]
    user_input: str
    agent_response: str
    metadata: dict[str, Any]


class EchoModel(BaseChatModel):
    """A chat model that repeats the last message, streamed in `chunks` pieces over `delay_s`."""

    chunks: int
    delay_s: float

    @property
    def _llm_type(self) -> str:
        return "echo"

    def _generate(self, messages: list[BaseMessage], *arguments: Any, **options: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(str(messages[-1].text)))])

    async def _astream(
        self, messages: list[BaseMessage], *arguments: Any, **options: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        text = str(messages[-1].text)
        for i in range(self.chunks):
            await asyncio.sleep(self.delay_s / self.chunks)
            piece = text[len(text) * i // self.chunks : len(text) * (i + 1) // self.chunks]
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))


class EchoConfig(msgspec.Struct):
    """The config of an agent on the graph `echo`: how long an answer takes, and the pieces that it is streamed in."""

    delay_ms: Annotated[float, msgspec.Meta(ge=0, le=3_600_000)] = 0
    chunks: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1


async def _echo(state: EchoState, config: RunnableConfig) -> EchoState:
    settings = msgspec.convert(config.get("configurable", {}), EchoConfig)
    text = f"You said: {state['user_input']}"
    if settings.chunks > 1:
        model = EchoModel(chunks=settings.chunks, delay_s=settings.delay_ms / 1000)
        text = str((await model.ainvoke([AIMessage(text)])).text)
    elif settings.delay_ms:
        await asyncio.sleep(settings.delay_ms / 1000)
    return {"agent_response": text, "metadata": {"history": len(state["messages"]) - 1}}


def echo_graph() -> Pregel[Any, Any, Any, Any]:
    """The compiled graph. It answers at once unless the agent's config says otherwise (EchoConfig)."""
    graph = StateGraph(EchoState)
    graph.add_node("echo", _echo)
    graph.set_entry_point("echo")
    return graph.compile()


def check_echo(config: dict[str, Any]) -> None:
    """Raises ValueError that names the field of a config that is wrong."""
    msgspec.convert(config, EchoConfig)
