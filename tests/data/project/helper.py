"""The helper: LangGraph's plain MessagesState, and a chat model without a network that answers from the history."""

from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.graph import MessagesState, StateGraph


class RecallingModel(BaseChatModel):
    """Answers with every question it was given. Its tokens are messages in, and one out."""

    @property
    def _llm_type(self) -> str:
        return "recalling"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        questions = [str(message.text) for message in messages if isinstance(message, HumanMessage)]
        answer = AIMessage(
            "You asked: " + " | ".join(questions),
            usage_metadata={"input_tokens": len(messages), "output_tokens": 1, "total_tokens": len(messages) + 1},
            response_metadata={"model_name": "recalling-1"},
        )
        return ChatResult(generations=[ChatGeneration(message=answer)])


_model = RecallingModel()


async def _answer(state: MessagesState) -> dict[str, list[BaseMessage]]:
    return {"messages": [await _model.ainvoke(state["messages"])]}


_builder = StateGraph(MessagesState)
_builder.add_node("answer", _answer)
_builder.set_entry_point("answer")
graph = _builder.compile()
