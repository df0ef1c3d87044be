"""The agents of this installation: looked up by UUID or name, created, changed and deleted.

Postgres owns the definitions; Redis has a copy of each, which pods look up again after at most 2 s. So a change is on
every pod within seconds, and agents are found while Postgres is down.

While Redis cannot be reached, or the shard with an agent's copy, a pod goes on with the definition that it knows, whatever
its age; one that knows none asks Postgres. So an agent that is deleted or switched off meanwhile is so at once on the pod
that did it, and on every other as soon as Redis can be reached and has been told: the operator's call fails until then, and
has to be repeated. An agent that Redis has no copy of and Postgres does not know is gone.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, NamedTuple

import msgspec
from uuid_utils import uuid7

from gateway.access.audit import Operator, audited, changed
from gateway.access.domains import check_allowed_domains
from gateway.access.tokens import fingerprint
from gateway.definitions import Definitions
from gateway.problems import AgentNotFound, InvalidField, NameTaken, invalid_field
from persistence.errors import DataRefused, PostgresUnavailable, RedisUnavailable
from persistence.model.agents import Agent, AgentDefinition, null_parts
from persistence.model.ids import as_uuid
from persistence.postgres.postgres import Postgres
from persistence.redis.agent_copies import AgentCopies
from persistence.tasks import retrieve

COPY_S = 0.5
"""How long Redis has for the copy of an agent that the pod does not know, before Postgres is asked."""

Document = dict[str, Any]
"""An agent as JSON: its definition, and perhaps `id` and `name`; `document_of` makes the whole of it."""

Change = Callable[[Document | None], Document]
"""Makes an agent's new document from its stored one (None: there is no such agent)."""

Check = Callable[[AgentDefinition, AgentDefinition | None], None]
"""Raises InvalidField for a new definition that must not be stored; the second argument is the stored one."""


class Written(NamedTuple):
    """A write's result: the agent, and what it was before (None: it is new)."""

    agent: Agent
    before: Agent | None


def no_check(definition: AgentDefinition, stored: AgentDefinition | None) -> None:
    """The check that refuses nothing."""


class Agents:
    """Finds, writes and deletes agents."""

    def __init__(self, copies: AgentCopies, postgres: Postgres, *, clock: Callable[[], float] = monotonic) -> None:
        self._copies = copies
        self._postgres = postgres
        self._definitions = Definitions(self._look_up, clock)

    async def load(self, reference: str) -> Agent:
        """The agent with this UUID or name: as of at most 2 s ago, or as it is known while Redis cannot be reached. Raises
        AgentNotFound, and RedisUnavailable when neither store tells of one that is not known."""
        agent = await self.find(reference)
        if agent is None:
            raise AgentNotFound
        return agent

    async def find(self, reference: str) -> Agent | None:
        """As `load`; None when there is no such agent."""
        if self.known(reference) is None:
            _check_reference(reference)
        return await self._definitions.find(reference)

    async def _look_up(self, reference: str) -> Agent | None:
        copying = asyncio.ensure_future(self._copies.find(reference))
        copying.add_done_callback(retrieve)
        try:
            if self.known(reference) is None:
                # Nobody is answered without a definition, so a copy that cannot be had soon is not waited for.
                await asyncio.wait({copying}, timeout=COPY_S)
                if not copying.done() or isinstance(copying.exception(), RedisUnavailable):
                    with suppress(PostgresUnavailable):
                        return await self._postgres.find_agent(reference)
            agent = await copying
        finally:
            copying.cancel()
        if agent is None:
            try:
                agent = await self._postgres.find_agent(reference)
                if agent is not None:
                    agent = await self._copy(agent)
            except (PostgresUnavailable, RedisUnavailable):
                # Redis has a copy of every agent that was ever written or looked up: without one it does not exist, unless
                # Postgres has just told of it and cannot tell Redis.
                return agent
        return agent

    def known(self, reference: str) -> Agent | None:
        """The agent as it was last looked up; asks neither store."""
        return self._definitions.known(reference)

    async def load_stored(self, reference: str) -> Agent:
        """The agent with this UUID or name as Postgres has it now. Raises AgentNotFound, PostgresUnavailable."""
        _check_reference(reference)
        agent = await self._postgres.find_agent(reference)
        if agent is None:
            raise AgentNotFound
        return agent

    async def list(self) -> list[Agent]:
        """Every agent, by name."""
        return await self._postgres.list_agents()

    async def put(self, reference: str, definition: AgentDefinition) -> tuple[Agent, bool]:
        """Creates the agent of that name, or replaces the definition of the one with that UUID or name.

        Returns the agent and whether it is new.
        """
        document = msgspec.to_builtins(definition)
        written = await self.write(reference, lambda stored: document)
        return written.agent, written.before is None

    async def write(
        self, reference: str, change: Change, operator: Operator | None = None, *, check: Check = no_check
    ) -> Written:
        """Creates the agent of that name, or changes the one with that UUID or name.

        `change` gets the stored document while the agent's row is locked, so no concurrent write is lost. The audit line
        names the changed fields. Raises InvalidField, AgentNotFound, NameTaken, and what `change` raises.
        """
        with audited("agent_put", operator) as facts:
            if as_uuid(reference) is None:
                check_name(reference)

            def changed_agent(stored: Agent | None) -> Agent:
                if stored is not None:
                    facts["agent"] = stored.id
                document = change(document_of(stored) if stored else None)
                if stored is None and as_uuid(reference) is not None:
                    raise AgentNotFound("an agent is created under a name, not under a UUID")
                old = stored.definition if stored else None
                definition = read_definition(document, reference, stored)
                check(definition, old)
                facts["fields"] = changed(old, definition)
                return Agent(stored.id if stored else str(uuid7()), stored.name if stored else reference, definition)

            try:
                before, agent = await self._postgres.change_agent(reference, changed_agent)
            except DataRefused as error:
                if error.constraint:
                    raise NameTaken from error
                raise InvalidField(f"definition: {error}", field="definition") from error
            try:
                await self._copy(agent)
            finally:
                # Also when Redis cannot be told: Postgres has it, and here it holds.
                self._definitions.clear()
            facts |= {"agent": agent.id, "created": before is None}
        return Written(agent, before)

    async def _copy(self, agent: Agent) -> Agent | None:
        """Copies an agent that was just read or written to Redis; returns what is stored by then.

        Postgres is read again after the copy is written: a concurrent writer may have copied a later definition before, and
        the earlier one must not stay.
        """
        copied: Agent | None = None
        latest: Agent | None = agent
        while latest is not None and latest != copied:
            await self._copies.put(latest)
            copied, latest = latest, await self._postgres.find_agent(agent.id)
        if latest is None:
            await self._copies.delete(agent)
        return latest

    async def delete(self, reference: str, operator: Operator | None = None) -> Agent:
        """Deletes an agent and returns what it was; its sessions stay. Raises AgentNotFound."""
        with audited("agent_deleted", operator) as facts:
            agent = await self.load_stored(reference)
            await self._postgres.delete_agent(agent.id)
            try:
                await self._copies.delete(agent)
            finally:
                self._definitions.clear()
            facts["agent"] = agent.id
        return agent


def document_of(agent: Agent) -> Document:
    """An agent as it is shown, and can be written back: site keys as fingerprints."""
    definition = msgspec.json.decode(msgspec.json.encode(agent.definition), type=Document)
    keys = [fingerprint(key) for key in agent.definition.site_keys]
    return {"id": agent.id, "name": agent.name, **definition, "site_keys": keys}


def read_definition(document: Document, reference: str, stored: Agent | None) -> AgentDefinition:
    """The definition that a document holds, with its site keys whole.

    `id` and `name` may be in the document if they are the agent's own; a fingerprint stands for the stored site key that it
    is of. Raises InvalidField.
    """
    fields = dict(document)
    for name, own in (("id", stored.id if stored else None), ("name", stored.name if stored else reference)):
        if name in fields and (own is None or fields.pop(name) != own):
            why = "the agent has another, which stays" if own else "a new agent is given one: leave it out"
            raise InvalidField(f"{name}: {why}", field=name)
    try:
        definition = msgspec.convert(fields, AgentDefinition)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from error
    try:
        check_allowed_domains(definition.allowed_domains)
    except ValueError as error:
        raise InvalidField(f"allowed_domains: {error}", field="allowed_domains") from error
    known_keys = stored.definition.site_keys if stored else ()
    by_fingerprint = {fingerprint(key): key for key in known_keys}
    try:
        keys = tuple(by_fingerprint[key] if key.startswith("sha256:") else key for key in definition.site_keys)
    except KeyError as error:
        raise InvalidField("site_keys: the agent has no key with this fingerprint", field="site_keys") from error
    if len(set(keys)) < len(keys):
        raise InvalidField("site_keys: the same key twice", field="site_keys")
    return msgspec.structs.replace(definition, site_keys=keys)


def merge_patch(document: Document, patch: Document) -> Document:
    """A document with a JSON merge patch applied (RFC 7396): objects merge, `null` removes, all else replaces.

    A field of the definition that is removed takes its default. Two exceptions let every document be its own patch, though
    null can be a value: a limit or `retention_days` is set to null, which is none; inside `config` and other objects a null
    that is already there stays.
    """
    values = {name: None for name, value in patch.items() if value is None and name not in RESET_BY_NULL}
    return {**_merged(document, patch), **values}


def _merged(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is not None:
            merged[name] = _merged(merged.get(name), value)
        elif merged.get(name) is not None:
            del merged[name]
    return merged


RESET_BY_NULL = frozenset(
    field.name for field in msgspec.structs.fields(AgentDefinition) if not field.required and not null_parts(field.type)
)
"""The fields that null takes back to their defaults. To the others it is a value, or an error."""


class Difference(NamedTuple):
    """A field whose value two documents do not share; `UNSET` where it is in one of them alone."""

    field: str
    before: Any
    after: Any


def differences(before: Document, after: Document) -> list[Difference]:
    """What differs between two documents; inside objects by path, as `config.model`."""
    found = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name, msgspec.UNSET), after.get(name, msgspec.UNSET)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [Difference(f"{name}.{inner.field}", *inner[1:]) for inner in differences(old, new)]
        elif old != new or isinstance(old, bool) != isinstance(new, bool):
            found.append(Difference(name, old, new))
    return found


def check_name(name: str) -> None:
    """Raises InvalidField unless `name` can be an agent's name."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name):
        raise InvalidField("agent_id: a name is 1 to 100 of A-Z a-z 0-9 _ . -", field="agent_id")


def _check_reference(reference: str) -> None:
    """Raises AgentNotFound for what can be neither a UUID nor a name."""
    if as_uuid(reference) is None:
        try:
            check_name(reference)
        except InvalidField as error:
            raise AgentNotFound from error
