"""Runs responses: as a body, as a stream, or in the background, where they outlive the connection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from gateway.core import sse
from gateway.core.response_input import answered_messages, chat_body, input_messages, own_param
from gateway.core.responses import ResponseBody, ResponseFold
from gateway.core.tools.definitions import tool_use
from gateway.errors import ApiError, bad_request
from gateway.openai import ChatMessage
from gateway.services.answer import Answer
from gateway.services.bus import Bus
from gateway.services.front import RESPONSE, Front, Prompt
from gateway.services.response_store import ResponseStore, StoredResponse

_log = logging.getLogger(__name__)

UNFINISHED: Final = ("queued", "in_progress")


def not_found(response_id: str) -> ApiError:
    """404: not kept, not kept any more, or somebody else's."""
    return ApiError(HTTPStatus.NOT_FOUND, f"There is no response `{response_id[:100]}`.", param="response_id")


class RunningResponse:
    """One response that is being made."""

    def __init__(self, answer: Answer, fold: ResponseFold, conversation: list[ChatMessage], owner: str) -> None:
        self.answer = answer
        self.fold = fold
        self._conversation = conversation
        self.owner = owner

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Events as they come; the last one is there however it ends."""
        finish_reason: str | None = None
        began = False
        try:
            async for deltas in self.answer.deltas():
                if not began:
                    began = True
                    yield self.fold.start()
                for _, delta in deltas:
                    finish_reason = delta.finish_reason or finish_reason
                    yield self.fold.push(delta)
        except ApiError as error:
            if not began:
                raise
            yield self.fold.fail(error, self.answer.usage)
            return
        yield self.fold.finish(finish_reason, self.answer.usage)

    def stored(self) -> StoredResponse:
        """As it is now."""
        output = self.fold.response["output"]
        conversation = [*self._conversation, *answered_messages(output)]
        return StoredResponse(response=self.fold.response, conversation=conversation, owner=self.owner)


class Responses:
    """All responses of this gateway."""

    def __init__(self, front: Front, bus: Bus, model: str) -> None:
        self._front = front
        self._bus = bus
        self.store = ResponseStore(bus, model)
        self._background: dict[str, tuple[RunningResponse, asyncio.Task[None]]] = {}
        bus.on_response_cancelled = self._on_cancelled

    async def begin(self, body: ResponseBody, headers: Mapping[str, str], owner: str) -> RunningResponse:
        """Check and admit. Raises ApiError."""
        if body.background and (body.stream or not body.is_stored):
            raise bad_request("background needs store: true and no stream", "background")
        self._front.check_model(body.model)
        history = await self._history(body.previous_response_id, owner)
        chat = chat_body(body, history)
        try:
            tools = tool_use(chat)
            prompt: Prompt = await asyncio.to_thread(self._front.chat_prompt, chat)
            shape = await self._front.structure.shape(chat, tools, prompt.text)
            answer = self._front.start(RESPONSE, chat, [prompt], headers, grammar=shape.grammar, parser=shape.parser)
        except ApiError as error:
            error.param = own_param(error.param)
            raise
        fold = ResponseFold(answer.id, int(time.time()), body)
        return RunningResponse(answer, fold, [*history, *input_messages(body.input)], owner)

    async def run(self, running: RunningResponse) -> dict[str, Any]:
        """The whole response. Raises ApiError if it fails before its first token."""
        async for _ in running.events():
            pass
        await self.keep(running)
        return running.fold.response

    async def stream(self, running: RunningResponse) -> AsyncIterator[bytes]:
        """As server-sent events."""
        async for events in running.events():
            if events and events[-1]["type"].removeprefix("response.") in ("completed", "incomplete", "failed"):
                await self.keep(running)
            yield b"".join(map(sse.named_event, events))

    async def run_in_background(self, running: RunningResponse) -> dict[str, Any]:
        """The response as it begins; it goes on without the client."""
        running.fold.response["status"] = "queued"
        await self.store.put(running.stored())
        queued = dict(running.fold.response)
        running.fold.response["status"] = "in_progress"
        task = asyncio.create_task(self._finish(running))
        self._background[running.fold.id] = (running, task)
        return queued

    async def keep(self, running: RunningResponse) -> None:
        """Store it, if the client wants that. The answer is there, with or without the store."""
        if not running.fold.response["store"]:
            return
        try:
            await self.store.put(running.stored())
        except ApiError as error:
            _log.warning("response %s is not kept: %s", running.fold.id, error)

    async def cancel(self, response_id: str, owner: str) -> dict[str, Any]:
        """Stop a response that runs in the background, here or in another gateway. Raises ApiError."""
        stored = await self.store.get(response_id, owner)
        if stored is None:
            raise not_found(response_id)
        if not stored.response["background"]:
            raise bad_request("only responses that run in the background can be cancelled", "response_id")
        if stored.response["status"] not in UNFINISHED:
            return stored.response
        stored.response["status"] = "cancelled"
        await self.store.put(stored)
        await self._bus.cancel_response(response_id)
        return stored.response

    async def delete(self, response_id: str, owner: str) -> None:
        """Forget it, and stop it if it still runs. Raises ApiError."""
        stored = await self.store.get(response_id, owner)
        if stored is None:
            raise not_found(response_id)
        await self.store.delete(response_id)
        await self._bus.cancel_response(response_id)

    def _on_cancelled(self, response_id: str) -> None:
        """Somebody has cancelled it: end it, if it runs here."""
        found = self._background.pop(response_id, None)
        if found is not None:
            found[1].cancel()

    async def close(self) -> None:
        """End what runs in the background."""
        tasks = [task for _, task in self._background.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _finish(self, running: RunningResponse) -> None:
        try:
            began = False
            async for _ in running.events():
                if not began:
                    began = True
                    await self._update(running)
        except ApiError as error:
            running.fold.fail(error, running.answer.usage)
        except asyncio.CancelledError:
            running.fold.cancel()
            raise
        finally:
            running.answer.close()
            self._background.pop(running.fold.id, None)
            await self._update(running)

    async def _update(self, running: RunningResponse) -> None:
        """Keep it as it is now, unless it has been deleted."""
        try:
            if await self.store.get(running.fold.id, running.owner) is not None:
                await self.store.put(running.stored())
        except ApiError as error:
            _log.warning("response %s is not brought up to date: %s", running.fold.id, error)

    async def _history(self, previous_id: str | None, owner: str) -> list[ChatMessage]:
        if previous_id is None:
            return []
        stored = await self.store.get(previous_id, owner)
        if stored is None:
            message = f"Previous response `{previous_id[:100]}` not found."
            raise bad_request(message, "previous_response_id", "previous_response_not_found")
        if stored.response["status"] in UNFINISHED:
            raise bad_request(f"Previous response `{previous_id[:100]}` is not done.", "previous_response_id")
        return stored.conversation
