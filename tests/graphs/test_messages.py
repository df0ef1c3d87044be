"""Messages that are made without LangChain's constructors are the same, and share nothing."""

import copy
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from gateway.graphs.messages import message_maker

KINDS = [HumanMessage, AIMessage, SystemMessage]


def containers_of(message: BaseMessage) -> list[Any]:
    """What of a message can be changed in place."""
    parts = [*vars(message).values(), vars(message), message.model_fields_set, message.__pydantic_extra__]
    return [part for part in parts if part is not None and not isinstance(part, (str, int, float, bool))]


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_the_history_are_what_langchains_constructors_make(kind: type[BaseMessage]) -> None:
    made, constructed = message_maker(kind)("Hello", "id 1"), kind(content="Hello", id="id 1")
    assert type(made) is kind
    assert made == constructed
    assert repr(made) == repr(constructed)
    assert vars(made) == vars(constructed)
    assert made.model_dump_json(exclude_unset=True) == constructed.model_dump_json(exclude_unset=True)


@pytest.mark.parametrize("kind", KINDS)
def test_two_messages_share_nothing_that_a_graph_can_change(kind: type[BaseMessage]) -> None:
    make = message_maker(kind)
    one, other = make("Hello", "id 1"), make("Hello", "id 2")
    assert containers_of(one)
    assert not {id(part) for part in containers_of(one)} & {id(part) for part in containers_of(other)}
    # Without containers of their own they would: pydantic's copy has those of its original.
    assert {id(part) for part in containers_of(one)} & {id(part) for part in containers_of(copy.copy(one))}
