"""Visitors: each holds one conversation after another, insists on its answers as the widget does, and checks them."""

import asyncio
import json
from random import Random
from time import monotonic
from typing import Any

import httpx

from tests.chaos.graphs.recall import SECRET
from tests.chaos.ledger import Agent, Conversation, Ledger, Message
from tests.chaos.site import Site
from tests.support.sse import TERMINAL, SseParser

TURNS = 20
"""Messages of a conversation at most: all of it stays within the history window, so that an answer tells what is missing."""
REFUSALS = frozenset(
    ("backlog_full", "queue_full", "turn_in_progress", "session_ended", "session_not_found", "agent_not_found")
)
"""Codes that say that the message was not answered, and will not be."""
PASSING = REFUSALS | {
    "redis_unavailable",
    "postgres_unavailable",
    "draining",
    "turn_superseded",
    "turn_lost",
    "turn_timeout",
    "turn_not_found",
}
"""Codes that a fault may cause; others are a breach."""


class Unanswered(Exception):
    """An attempt ended without the answer. `code` is the problem's, or empty when nothing is known."""

    def __init__(self, code: str = "") -> None:
        super().__init__(code)
        self.code = code


class Visitors:
    """All visitors of a run. `cancel_share` of the requests are cut off by the client midway."""

    def __init__(self, site: Site, ledger: Ledger) -> None:
        self._site = site
        self._ledger = ledger
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._flight = 0
        self.cancel_share = 0.0
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(max(3, 1.5 * site.options.lease_s), connect=1), limits=limits)

    def start(self) -> None:
        options = self._site.options
        for number in range(options.visitors):
            chance = Random(f"visitor {number} of seed {options.seed}")
            self._tasks.append(asyncio.create_task(self._visit(number, chance)))

    async def stop(self) -> None:
        """Lets every visitor finish the message that it is at; until then it goes on asking."""
        self._stopping.set()
        patience_s = self._site.options.patience_s
        done, late = await asyncio.wait(self._tasks, timeout=patience_s)
        for task in late:
            self._ledger.unexpected.append(f"a visitor was not answered within {patience_s:g} s after the last fault")
            task.cancel()
        for task in done:
            task.result()
        await self._http.aclose()

    async def _visit(self, number: int, chance: Random) -> None:
        count = 0
        while not self._stopping.is_set():
            count += 1
            agent: Agent = "brief" if chance.random() < 0.3 else "usual"
            secret = f"secret-{chance.randbytes(8).hex()}"
            conversation = Conversation(f"session_{number:03d}_{count:05d}_chaos", secret, agent)
            if chance.random() < 0.3:
                await self._mint(conversation, chance)
            self._ledger.conversations.append(conversation)
            await self._converse(conversation, chance)
            conversation.over = True

    async def _converse(self, conversation: Conversation, chance: Random) -> None:
        for number in range(1, chance.randint(3, TURNS) + 1):
            if self._stopping.is_set():
                return
            work_ms = chance.choice(self._site.options.work_ms)
            text = f"{conversation.secret} {number} {work_ms}"
            message = Message(number, text, work_ms / 1000, monotonic())
            conversation.messages.append(message)
            await self._insist(conversation, message, chance)
            if chance.random() < 0.2:
                await self._read_transcript(conversation, chance)
            # Longer than sessions of the agent `brief` stay in Redis, now and then.
            pause_s = 2.5 if conversation.agent == "brief" and chance.random() < 0.2 else chance.uniform(0, 0.4)
            await self._pause(pause_s)
        certain = not any(message.doubtful for message in conversation.messages)
        draw = chance.random()
        if draw < 0.25:
            conversation.ended = await self._close(conversation, "POST", "/end", chance)
        elif draw < 0.5 and certain:
            # A request that may still be on its way would open the session anew.
            conversation.erased = await self._close(conversation, "DELETE", "", chance)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def _mint(self, conversation: Conversation, chance: Random) -> None:
        """Has the gateway mint a session; a browser's own id is used when it cannot."""
        try:
            body = {"agent_id": conversation.agent}
            answer = await self._http.post(f"{self._url(chance)}/api/sessions", json=body)
        except httpx.HTTPError:
            return
        if answer.status_code == 201:
            conversation.session_id = answer.json()["session_id"]
            conversation.token = answer.json()["session_token"]

    def _url(self, chance: Random) -> str:
        return self._site.pods[self._site.choose(chance)].url

    def _headers(self, conversation: Conversation) -> dict[str, str]:
        return {"Authorization": f"Bearer {conversation.token}"} if conversation.token else {}

    async def _close(self, conversation: Conversation, method: str, path: str, chance: Random) -> bool:
        """Ends or erases a session; whether that was answered. It is asked for until it is."""
        while True:
            url = f"{self._url(chance)}/api/sessions/{conversation.session_id}{path}"
            try:
                answer = await self._http.request(method, url, headers=self._headers(conversation))
                if answer.is_success:
                    return True
                if answer.status_code == 404:
                    # Erased by a request whose answer was lost, or never there: no message of it was answered.
                    return method == "DELETE"
                if not self._may_pass(answer, conversation):
                    return False
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.3)

    async def _read_transcript(self, conversation: Conversation, chance: Random) -> None:
        """Asks for the messages of the session, which must have all that has been answered, in order and once."""
        answered = [message.number for message in conversation.answered()]
        url = f"{self._url(chance)}/api/sessions/{conversation.session_id}/messages?limit=100"
        try:
            answer = await self._http.get(url, headers=self._headers(conversation))
        except httpx.HTTPError:
            return
        self._look_for_foreign(conversation, answer.text)
        if answer.status_code != 200:
            if answered or answer.json()["code"] != "session_not_found":
                self._may_pass(answer, conversation)
            return
        found = [int(one["content"].split()[1]) for one in answer.json()["messages"] if one["role"] == "user"]
        if [number for number in found if number in answered] != answered:
            self._ledger.out_of_order.append(f"{conversation.session_id}: answered {answered}, its transcript has {found}")

    async def _insist(self, conversation: Conversation, message: Message, chance: Random) -> None:
        """Sends a message until it is answered; gives some up that were neither answered nor refused."""
        self._flight += 1
        flight = self._flight
        self._ledger.in_flight[flight] = (conversation, message)
        try:
            while True:
                message.pod = self._site.choose(chance)
                try:
                    body = await self._attempt(conversation, message, chance)
                except httpx.ConnectError:
                    # Nothing was sent; a balancer goes on with the next pod.
                    await asyncio.sleep(0.05)
                    continue
                except Unanswered as error:
                    message.failures.append((monotonic(), error.code, message.pod))
                    message.doubtful |= error.code not in REFUSALS
                    if error.code == "session_ended" or (chance.random() < 0.05 and not self._stopping.is_set()):
                        return
                    await asyncio.sleep(chance.uniform(0.05, 0.3))
                    continue
                message.answered_at = monotonic()
                message.answer = body["response"]
                self._check(conversation, message, body)
                return
        finally:
            del self._ledger.in_flight[flight]

    async def _attempt(self, conversation: Conversation, message: Message, chance: Random) -> dict[str, Any]:
        """One request; the answer. Raises Unanswered or ConnectError."""
        streamed = chance.random() < 0.3
        asking = asyncio.create_task(
            self._streamed(conversation, message, chance) if streamed else self._asked(conversation, message)
        )
        if self.cancel_share and chance.random() < self.cancel_share:
            await asyncio.wait({asking}, timeout=chance.uniform(0, message.work_s + 0.05))
            if not asking.done():
                asking.cancel()
                await asyncio.wait({asking})
                self._ledger.cancelled += 1
                raise Unanswered
        try:
            return await asking
        except httpx.ConnectError:
            raise
        except httpx.HTTPError as error:
            raise Unanswered from error

    def _body(self, conversation: Conversation, message: Message) -> dict[str, Any]:
        return {
            "message": message.text,
            "session_id": conversation.session_id,
            "message_id": message.message_id,
            "metadata": {"secret": conversation.secret},
        }

    async def _asked(self, conversation: Conversation, message: Message) -> dict[str, Any]:
        url = f"{self._site.pods[message.pod].url}/api/chat/{conversation.agent}/message"
        headers = self._headers(conversation)
        answer = await self._http.post(url, json=self._body(conversation, message), headers=headers)
        self._look_for_foreign(conversation, answer.text)
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            return found
        self._may_pass(answer, conversation)
        raise Unanswered(answer.json()["code"])

    async def _streamed(self, conversation: Conversation, message: Message, chance: Random) -> dict[str, Any]:
        """Reads a stream to its end; when it breaks off, resumes it on whichever pod."""
        site, headers = self._site, self._headers(conversation)
        url = f"{site.pods[message.pod].url}/api/chat/{conversation.agent}/stream"
        body: dict[str, Any] | None = self._body(conversation, message)
        turn_id, cursor, resumes = "", "", 0
        while True:
            parser, method = SseParser(), "POST" if body else "GET"
            try:
                async with self._http.stream(method, url, json=body, headers=headers) as answer:
                    if answer.status_code != 200:
                        await answer.aread()
                        self._look_for_foreign(conversation, answer.text)
                        self._may_pass(answer, conversation)
                        raise Unanswered(answer.json()["code"] if method == "POST" else "")
                    async for chunk in answer.aiter_raw():
                        self._look_for_foreign(conversation, chunk.decode(errors="replace"))
                        for event in parser.feed(chunk):
                            cursor = event.id
                            if event.kind == "turn.started":
                                turn_id = event.data["turn_id"]
                                if self.cancel_share and chance.random() < self.cancel_share:
                                    raise httpx.ReadError("the visitor's own network broke off")
                            elif event.kind == "turn.completed":
                                completed: dict[str, Any] = event.data
                                return completed
                            elif event.kind in TERMINAL:
                                self._may_pass_code(str(event.data.get("code", event.kind)), conversation)
                                raise Unanswered
            except httpx.HTTPError:
                if not turn_id or resumes == 5:
                    raise
            # The stream broke off after the turn had begun.
            resumes += 1
            self._ledger.resumed += 1
            await asyncio.sleep(0.1)
            body = None
            headers = {**self._headers(conversation), "Last-Event-ID": cursor}
            pod = site.pods[site.choose(chance)].url
            url = f"{pod}/api/chat/{conversation.agent}/turns/{turn_id}/stream?session_id={conversation.session_id}"

    def _may_pass(self, answer: httpx.Response, conversation: Conversation) -> bool:
        return self._may_pass_code(str(answer.json()["code"]), conversation)

    def _may_pass_code(self, code: str, conversation: Conversation) -> bool:
        """Whether a fault may be the cause of this answer; else it is written down."""
        if code in PASSING or (code == "session_damaged" and conversation.damaged):
            return True
        self._ledger.unexpected.append(f"{conversation.session_id}: {code}")
        return False

    def _look_for_foreign(self, conversation: Conversation, text: str) -> None:
        for secret in set(SECRET.findall(text)) - {conversation.secret}:
            self._ledger.foreign.append(f"{conversation.session_id} was shown {secret}")

    def _check(self, conversation: Conversation, message: Message, body: dict[str, Any]) -> None:
        """Whether the graph was given all that had been answered before, in order and once."""
        self._look_for_foreign(conversation, json.dumps(body))
        where = f"{conversation.session_id} message {message.number}"
        known = json.loads(body["response"])
        earlier = known["earlier"]
        before = [
            other.number for other in conversation.answered() if other is not message and other.answered_at < message.sent_at
        ]
        if known["number"] != message.number:
            self._ledger.out_of_order.append(f"{where}: was given the answer to {known['number']}")
        if [number for number in earlier if number in before] != before:
            self._ledger.out_of_order.append(f"{where}: the graph was given {earlier}, answered were {before}")
        if known["turns"] != len(earlier):
            self._ledger.out_of_order.append(
                f"{where}: the context knows {known['turns']} turns, the history {len(earlier)}"
            )
        if body["metadata"]["session_id"] != conversation.session_id:
            self._ledger.foreign.append(f"{where}: the answer names another session")
