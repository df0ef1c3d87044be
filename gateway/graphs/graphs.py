"""The operator's graphs, compiled once per process, and one call of a graph for one turn.

Graphs hold no session state: what a run starts from comes in, what is to be stored comes out, and a checkpointer of a
graph's own is left out.
"""

import asyncio
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import structlog
from langgraph.pregel import Pregel

from gateway.graphs.contract import Emit, GraphInput, GraphOutput
from gateway.graphs.exits import in_graph
from gateway.graphs.input import adds_messages, config_of, context_of, first_state, messages_of
from gateway.graphs.output import read_output
from gateway.graphs.running import final_state, streamed_state
from gateway.logs import frames
from gateway.problems import GraphFailed, GraphInvalidOutput, GraphNotConfigured, InvalidField
from persistence.model.agents import Agent, AgentDefinition

log = structlog.get_logger()

CheckConfig = Callable[[dict[str, Any]], Any]


class Graphs:
    """Compiled graphs by name; `checks` are those of the configs that built-in graphs take."""

    def __init__(
        self, graphs: Mapping[str, Pregel[Any, Any, Any, Any]], checks: Mapping[str, CheckConfig] = MappingProxyType({})
    ) -> None:
        self._graphs = dict(graphs)
        self._adding = {name for name, graph in graphs.items() if adds_messages(graph)}
        self._checks = checks

    @property
    def names(self) -> list[str]:
        return sorted(self._graphs)

    def check(self, definition: AgentDefinition) -> None:
        """Raises InvalidField when a definition's graph, or its config, is not one that this server can run."""
        if definition.graph not in self._graphs:
            raise InvalidField(f"graph: not one of this server's graphs: {', '.join(self.names)}", field="graph")
        check = self._checks.get(definition.graph)
        if check is not None:
            try:
                check(definition.config)
            except ValueError as error:
                raise InvalidField(f"config: {error}", field="config") from error

    async def run(self, agent: Agent, graph_input: GraphInput, emit: Emit | None = None) -> GraphOutput:
        """Runs the agent's graph once; with `emit`, hands on what it streams.

        Raises GraphNotConfigured, GraphFailed, GraphInvalidOutput.
        """
        name = agent.definition.graph
        graph = self._graphs.get(name)
        if graph is None:
            raise GraphNotConfigured(f"graph: {name}")
        given = messages_of(graph_input)
        state: Any = first_state(graph_input, given, overwrite=name in self._adding)
        config, context = config_of(agent, graph_input), context_of(graph, agent)
        in_graph.set(True)
        try:
            if emit is None:
                output = await final_state(graph, state, config, context)
            else:
                output = await streamed_state(graph, state, config, context, emit)
        except (asyncio.CancelledError, GraphInvalidOutput):
            raise
        except BaseException as error:
            # Whatever a graph raises ends its turn and nothing else.
            _log_failure(name, error)
            raise GraphFailed from error
        try:
            return read_output(output, graph_input, given)
        except GraphInvalidOutput:
            raise
        except Exception as error:
            # Objects that a graph left in its state run its code when they are looked at.
            _log_failure(name, error)
            raise GraphInvalidOutput("what the graph left in its state cannot be read") from error


def _log_failure(name: str, error: BaseException) -> None:
    """Logs where a graph failed, without the error's text, which may hold a visitor's words."""
    log.error("graph.failed", graph=name, error=type(error).__name__, frames=frames(error))
