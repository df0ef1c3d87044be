"""Visitors: each holds one conversation after another, insists on its answers as the widget does, and checks them."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from random import Random
from time import monotonic, time
from typing import Any

import httpx
import jwt

from tests.chaos.answers import NOT_REPLICATED, PASSING, REFUSALS, Answers, Told
from tests.chaos.ledger import Agent, Conversation, Ledger, Message
from tests.chaos.losses import Moment
from tests.chaos.site import SITE_KEY, Site
from tests.support.sse import SseParser

TURNS = 20
"""Messages of a conversation at most: all of it stays within the history window, so that an answer tells what is missing."""


USER_TOKEN_S = 900


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
        self._answers = Answers(ledger, PASSING | {NOT_REPLICATED} if site.options.loses_nothing else PASSING)
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
            if error := task.exception():
                self._ledger.unexpected.append(f"a visitor could not go on: {error!r}")

    async def look_again(self) -> None:
        """Reads every transcript once more, when all is calm."""
        at_once = asyncio.Semaphore(8)

        async def look(conversation: Conversation) -> None:
            # A connection that fell silent earlier may be found out only now.
            async with at_once:
                chance = Random(conversation.secret)
                for _ in range(5):
                    if await self._read_transcript(conversation, chance):
                        break
                else:
                    self._ledger.unexpected.append(f"{conversation.session_id} cannot be read after the last fault")
                await self._look_as_a_stranger(conversation, chance)

        await asyncio.gather(*(look(conversation) for conversation in self._ledger.conversations))

    async def close(self) -> None:
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
            elif chance.random() < 0.3:
                conversation.user, conversation.named_from = f"user-{number}", chance.choice((1, 2))
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
            if conversation.gone or not conversation.known():
                return
            if message.named and chance.random() < 0.2:
                await self._look_as_a_stranger(conversation, chance)
            if message.answer is not None and chance.random() < 0.2:
                await self._read_transcript(conversation, chance)
            if chance.random() < 0.1:
                await self._repeat(conversation, chance)
            # Longer than sessions of the agent `brief` stay in Redis, now and then.
            pause_s = 2.5 if conversation.agent == "brief" and chance.random() < 0.2 else chance.uniform(0, 0.4)
            # Who has given a message up comes at once with the next: until that is answered the session is unavailable.
            if message.answer is not None:
                await self._pause(pause_s)
        draw = chance.random()
        if draw < 0.25:
            conversation.ended = await self._close(conversation, "POST", "/end", chance)
            if conversation.ended:
                await self._come_back(conversation, chance)
        elif draw < 0.5:
            conversation.row_id = await self._site.row_id(conversation.session_id)
            conversation.erased = await self._close(conversation, "DELETE", "", chance)
            if conversation.erased:
                await self._read_transcript(conversation, chance)

    async def _repeat(self, conversation: Conversation, chance: Random) -> None:
        """Sends a message again that has been answered, once."""
        if answered := conversation.answered():
            message = chance.choice(answered)
            again = replace(message, pod=self._site.choose(chance))
            with suppress(Unanswered, httpx.HTTPError):
                body = await self._attempt(conversation, again, chance)
                again.answered_at = monotonic()
                self._ledger.repeated += 1
                self._answers.check_repeated(conversation, message, again, body)

    async def _come_back(self, conversation: Conversation, chance: Random) -> None:
        """Sends a message to a session that has ended, once: nobody may answer it, or store it. If that it has ended may be
        lost with a master, it is a message as any other."""
        message = Message(0, f"{conversation.secret} 0 0", 0, monotonic(), pod=self._site.choose(chance))
        try:
            body = await self._attempt(conversation, message, chance)
        except (Unanswered, httpx.HTTPError):
            if self._ledger.may_be_open_again(conversation):
                message.doubtful = True
                conversation.messages.append(message)
            return
        message.answered_at = monotonic()
        message.answer, message.turn_id = body["response"], body["metadata"]["turn_id"]
        if self._ledger.may_be_open_again(conversation):
            conversation.messages.append(message)

        def judge() -> None:
            if not self._ledger.may_be_open_again(conversation):
                self._ledger.unexpected.append(f"{conversation.session_id} had ended, and was answered")

        self._ledger.losses.look(judge)

    async def _look_as_a_stranger(self, conversation: Conversation, chance: Random) -> None:
        """Asks, without the user's token, for the messages of a session that is a user's, once: nobody may be shown them."""
        if conversation.erased or not conversation.bound():
            return
        with suppress(httpx.HTTPError):
            answer = await self._http.get(f"{self._url(chance)}/api/sessions/{conversation.session_id}/messages")
            if answer.status_code == 200:
                self._answers.check_stranger(conversation, answer.text)
            elif answer.status_code != 404:
                self._may_pass(answer, conversation)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def _mint(self, conversation: Conversation, chance: Random) -> None:
        """Has the gateway mint a session; a browser's own id is used when it cannot."""
        asked_at = monotonic()
        try:
            body = {"agent_id": conversation.agent}
            answer = await self._http.post(f"{self._url(chance)}/api/sessions", json=body)
        except httpx.HTTPError:
            return
        if answer.status_code == 201:
            conversation.session_id = answer.json()["session_id"]
            conversation.token = answer.json()["session_token"]
            conversation.opened = Moment(asked_at, monotonic())

    def _url(self, chance: Random) -> str:
        return self._site.pods[self._site.choose(chance)].url

    def _headers(self, conversation: Conversation, *, named: bool = True) -> dict[str, str]:
        """What proves that the session is the visitor's; with `named`, who the visitor is too, if the site knows."""
        headers = {"Authorization": f"Bearer {conversation.token}"} if conversation.token else {}
        if conversation.user and named:
            claims = {"sub": conversation.user, "exp": int(time()) + USER_TOKEN_S}
            headers["X-User-Token"] = jwt.encode(claims, SITE_KEY, algorithm="HS256")
        return headers

    async def _close(self, conversation: Conversation, method: str, path: str, chance: Random) -> bool:
        """Ends or erases a session; whether that was answered. It is asked for until it is."""
        # Nothing was ever answered, or it was erased by a request whose answer was lost.
        may_be_absent = not conversation.known()
        while True:
            url = f"{self._url(chance)}/api/sessions/{conversation.session_id}{path}"
            asked_at = monotonic()
            try:
                answer = await self._http.request(method, url, headers=self._headers(conversation))
                if answer.is_success or (answer.status_code == 404 and may_be_absent and method == "DELETE"):
                    conversation.closed = Moment(asked_at, monotonic())
                    return True
                if answer.status_code == 404 and may_be_absent:
                    return False
                if not self._may_pass(answer, conversation):
                    return False
                if answer.status_code == 404:
                    conversation.gone = True
                    return False
            except httpx.HTTPError:
                pass
            may_be_absent |= method == "DELETE"
            await asyncio.sleep(0.3)

    async def _read_transcript(self, conversation: Conversation, chance: Random) -> bool:
        """Asks for the messages of the session; whether that was answered."""
        known = conversation.known() and not conversation.erased
        url = f"{self._url(chance)}/api/sessions/{conversation.session_id}/messages?limit=100"
        try:
            answer = await self._http.get(url, headers=self._headers(conversation))
        except httpx.HTTPError:
            return False
        self._answers.look_for_foreign(conversation, answer.text)
        if answer.status_code == 200:
            self._answers.check_transcript(conversation, answer.json()["messages"])
            return True
        if answer.status_code == 404 and not known:
            return True
        return self._may_pass(answer, conversation) and answer.status_code == 404

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
                    gives_up = chance.random() < 0.05 and not self._stopping.is_set()
                    # Whether Postgres has a session of this id cannot be known now: the visitor tries with another one.
                    unopened = error.code == "postgres_unavailable" and not conversation.known()
                    conversation.gone = error.code == "session_not_found"
                    if error.code == "session_ended" or conversation.gone or unopened or gives_up:
                        return
                    # Whose turn has died with its pod need not wait any more: its lease is over.
                    await asyncio.sleep(0 if error.code == "turn_lost" else chance.uniform(0.05, 0.3))
                    continue
                message.answered_at = monotonic()
                message.answer, message.turn_id = body["response"], body["metadata"]["turn_id"]
                self._answers.check(conversation, message, body)
                return
        finally:
            del self._ledger.in_flight[flight]

    async def _attempt(self, conversation: Conversation, message: Message, chance: Random) -> dict[str, Any]:
        """One request; the answer. Raises Unanswered or ConnectError."""
        streamed = chance.random() < 0.3
        message.asked_at = monotonic()
        message.named = bool(conversation.user) and any(
            one.number >= conversation.named_from for one in (message, *conversation.messages)
        )
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
        headers = self._headers(conversation, named=message.named)
        answer = await self._http.post(url, json=self._body(conversation, message), headers=headers)
        self._answers.look_for_foreign(conversation, answer.text)
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            return found
        self._may_pass(answer, conversation)
        raise Unanswered(answer.json()["code"])

    async def _streamed(self, conversation: Conversation, message: Message, chance: Random) -> dict[str, Any]:
        """Reads a stream to its end; when it breaks off, resumes it on whichever pod."""
        site, headers = self._site, self._headers(conversation, named=message.named)
        url = f"{site.pods[message.pod].url}/api/chat/{conversation.agent}/stream"
        body: dict[str, Any] | None = self._body(conversation, message)
        told = Told(self._ledger, conversation, message)
        while True:
            parser, method = SseParser(), "POST" if body else "GET"
            try:
                async with self._http.stream(method, url, json=body, headers=headers) as answer:
                    if answer.status_code != 200:
                        await answer.aread()
                        self._answers.look_for_foreign(conversation, answer.text)
                        self._may_pass(answer, conversation)
                        raise Unanswered(answer.json()["code"] if method == "POST" else "")
                    async for chunk in answer.aiter_raw():
                        self._answers.look_for_foreign(conversation, chunk.decode(errors="replace"))
                        for event in parser.feed(chunk):
                            told.add(event)
                            if event.kind == "turn.started" and self.cancel_share and chance.random() < self.cancel_share:
                                raise httpx.ReadError("the visitor's own network broke off")
            except httpx.HTTPError:
                if not told.turn_id:
                    raise
            if told.end is not None:
                break
            # The stream broke off after the turn had begun.
            if told.resumed == 5:
                raise Unanswered
            told.resumed += 1
            self._ledger.resumed += 1
            await asyncio.sleep(0.1)
            body = None
            headers = {**self._headers(conversation, named=message.named), "Last-Event-ID": told.cursor}
            pod = site.pods[site.choose(chance)].url
            url = f"{pod}/api/chat/{conversation.agent}/turns/{told.turn_id}/stream?session_id={conversation.session_id}"
        if told.end.kind != "turn.completed":
            code = str(told.end.data.get("code", told.end.kind))
            self._answers.may_pass(code, conversation)
            raise Unanswered(code)
        completed: dict[str, Any] = told.end.data
        return completed

    def _may_pass(self, answer: httpx.Response, conversation: Conversation) -> bool:
        return self._answers.may_pass(str(answer.json()["code"]), conversation)
