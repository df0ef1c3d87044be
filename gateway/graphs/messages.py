"""LangChain's messages, made from stored ones by filling in their slots.

A constructor validates anew what has been stored as text, for each message of the history in each turn. Filling in the
slots, as unpickling does, saves half of that: 71 µs of a turn's 1,180 with 50 messages of history (November 2026).
It relies on how langchain-core and pydantic lay out a message, to which tests/graphs/test_messages.py pins it.
"""

from collections.abc import Callable
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from pydantic import BaseModel


def message_maker(kind: type[BaseMessage]) -> Callable[[str, str], BaseMessage]:
    """A function of content and id that makes messages equal to those of the constructor of `kind`.

    Each message gets containers of its own: what a graph adds to one visitor's message must not show up in another's.
    Raises TypeError for a kind whose containers are not empty at first.
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
