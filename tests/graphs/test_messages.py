"""Messages that are made without LangChain's constructors are the same, and share nothing."""

import copy
from importlib.metadata import version
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


SLOTS = {"__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__"}
FIELDS: dict[type[BaseMessage], dict[str, Any]] = {
    kind: {
        "content": "",
        "additional_kwargs": {},
        "response_metadata": {},
        "type": kind_name,
        "name": None,
        "id": "",
        **more,
    }
    for kind, kind_name, more in (
        (HumanMessage, "human", {}),
        (AIMessage, "ai", {"tool_calls": [], "invalid_tool_calls": [], "usage_metadata": None}),
        (SystemMessage, "system", {}),
    )
}
"""How the installed langchain-core lays out a message, as far as `gateway/graphs/messages.py` relies on it."""


def check_layout(kind: type[BaseMessage], fields: dict[str, Any]) -> None:
    """Compares a constructed message with the layout that messages are filled in by. Raises AssertionError."""
    state = kind(content="", id="").__getstate__()
    expected = {
        "__dict__": fields,
        "__pydantic_extra__": {},
        "__pydantic_fields_set__": {"content", "id"},
        "__pydantic_private__": None,
    }
    slots = {slot for base in kind.__mro__ for slot in getattr(base, "__slots__", ())}
    assert (state, slots) == (expected, SLOTS), (
        f"langchain-core {version('langchain-core')} with pydantic {version('pydantic')} lays out {kind.__name__} anew: "
        f"read its constructor and validators, adapt gateway/graphs/messages.py, and then this table; "
        f"found {state} in {sorted(slots)}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_installed_langchain_lays_out_messages_as_they_are_filled_in(kind: type[BaseMessage]) -> None:
    check_layout(kind, FIELDS[kind])


@pytest.mark.parametrize("change", ["a field", "a slot", "a field that is set"])
def test_control_a_new_layout_is_noticed_and_named(change: str) -> None:
    class Annotated(HumanMessage):
        """A message of a later langchain-core."""

        if change == "a slot":
            __slots__ = ("_cache",)
        if change == "a field":
            annotations: list[str] = []

        def __init__(self, content: str, **fields: Any) -> None:
            more = {"name": "Ann"} if change == "a field that is set" else {}
            super().__init__(content, **fields, **more)

    with pytest.raises(AssertionError, match=f"langchain-core {version('langchain-core')} .* lays out Annotated anew"):
        check_layout(Annotated, FIELDS[HumanMessage])
