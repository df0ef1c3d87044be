"""LangChain's messages, made from stored ones."""

from collections.abc import Callable
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from pydantic import BaseModel


def message_maker(kind: type[BaseMessage]) -> Callable[[str, str], BaseMessage]:
    """What makes LangChain's messages of a kind from content and id: equal to those of its constructor, at half its cost.

    A constructor validates anew what has been stored as text, for each message of the history in each turn. These are made
    by filling in a message's slots, as unpickling would; each gets containers of its own, or what a graph adds to a message
    of one visitor would be in those of all.
    """
    state = kind(content="", id="").__getstate__()
    fields = state["__dict__"]
    containers = [(name, type(value)) for name, value in fields.items() if not _is_immutable(value)]
    beside = (state["__pydantic_extra__"], state["__pydantic_private__"])
    if any(fields[name] != container() for name, container in containers) or beside != ({}, None):
        raise TypeError(f"{kind.__name__} begins with more than empty containers")
    new = kind.__new__
    slots = vars(BaseModel)
    set_fields, set_names = slots["__dict__"].__set__, slots["__pydantic_fields_set__"].__set__
    set_extra, set_private = slots["__pydantic_extra__"].__set__, slots["__pydantic_private__"].__set__

    def make(content: str, message_id: str) -> BaseMessage:
        own = fields.copy()
        for name, container in containers:
            own[name] = container()
        own["content"] = content
        own["id"] = message_id
        message = new(kind)
        set_fields(message, own)
        set_names(message, {"content", "id"})
        set_extra(message, {})
        set_private(message, None)
        return message

    return make


def _is_immutable(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


TO_LANGCHAIN: dict[str, Callable[[str, str], BaseMessage]] = {
    "user": message_maker(HumanMessage),
    "assistant": message_maker(AIMessage),
    "system": message_maker(SystemMessage),
}
