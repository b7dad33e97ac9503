"""A transformers model in this process as a pool member. (A vLLM server is an endpoint: ``routers.pool.endpoint``.)

Calls that wait are generated together, in one worker thread, so that the event loop goes on. Decoding is greedy: it
draws nothing from torch's global generator, which belongs to the training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from routers.data.catalogue import Member
from routers.pool.protocol import BAD_REQUEST, EMPTY, Attempt
from routers.pool.reasoning import split_reasoning
from srpo.rollout.special_tokens import known_ends
from srpo.types import Usage


@dataclass
class _Waiting:
    ids: list[int]
    result: asyncio.Future[list[int]]


class LocalModel:
    """One member; ``max_tokens``, ``system`` and ``context_length`` are the catalogue's.

    Args:
        member: prices and limits; its ``concurrency`` is also the largest batch that can form.
        model: a causal language model, on any device; it is put into evaluation mode.
        tokenizer: its tokenizer; the chat template is used if there is one.
        agent_prompt: text around the question, with ``{query}`` in it once.

    Raises:
        ValueError: a temperature above 0, or no ``{query}`` in the agent prompt.
    """

    def __init__(self, member: Member, model: Any, tokenizer: Any, agent_prompt: str = "{query}") -> None:
        if member.temperature > 0:
            raise ValueError(
                f"member {member.name!r}: local members are greedy; set temperature 0, or serve it by vLLM"
            )
        if agent_prompt.count("{query}") != 1:
            raise ValueError("the agent prompt must hold {query} once; it is where the question goes")
        self._member = member
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._agent_prompt = agent_prompt
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        """Without the weights: give a changed model another name."""
        member = self._member
        return {
            "local": member.model or member.name,
            "agent_prompt": self._agent_prompt,
            "system": member.system,
            "max_tokens": member.max_tokens,
        }

    @property
    def max_tokens(self) -> int:
        return self._member.max_tokens

    def prompt_bound(self, query: str) -> int:
        return len(self._ids(query))

    def _ids(self, query: str) -> list[int]:
        prompt = self._agent_prompt.replace("{query}", query)
        if not self._tokenizer.chat_template:
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        system = [{"role": "system", "content": self._member.system}] if self._member.system else []
        messages = [*system, {"role": "user", "content": prompt}]
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids

    async def send(self, query: str, timeout: float, query_id: str) -> Attempt:
        ids = self._ids(query)
        room = self._member.context_length
        if room is not None and len(ids) + self._member.max_tokens > room:
            return Attempt(error=f"{BAD_REQUEST}: a prompt of {len(ids)} tokens leaves no room in {room}")
        waiting = _Waiting(ids, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        new = await waiting.result
        usage = Usage(len(ids), len(new))
        text, reasoning = split_reasoning(self._tokenizer.decode(new, skip_special_tokens=True).strip())
        if text:
            return Attempt(text, usage, reasoning=reasoning)
        words = f"{EMPTY}: no text, only reasoning" if reasoning else f"{EMPTY}: no text"
        return Attempt(usage=usage, error=words, reasoning=reasoning)

    async def _work(self) -> None:
        """Generate what waits, batch by batch, and end when nothing does."""
        while self._waiting:
            batch = [waiting for waiting in self._waiting if not waiting.result.done()]
            self._waiting.clear()
            if not batch:
                return
            try:
                outcome: list[list[int]] | Exception = await asyncio.to_thread(self._generate, batch)
            except Exception as error:
                outcome = error
            for position, waiting in enumerate(batch):
                if waiting.result.done():  # nobody waits for it any more
                    continue
                if isinstance(outcome, Exception):
                    waiting.result.set_exception(outcome)
                else:
                    waiting.result.set_result(outcome[position])

    @torch.inference_mode()
    def _generate(self, batch: list[_Waiting]) -> list[list[int]]:
        """New ids per prompt, the end token included as it was generated."""
        width = max(len(waiting.ids) for waiting in batch)
        ends = set(known_ends(self._model, self._tokenizer))
        pad = next(iter(ends), 0)
        device = self._model.device
        ids = torch.tensor([[pad] * (width - len(w.ids)) + w.ids for w in batch], device=device)
        mask = torch.tensor([[0] * (width - len(w.ids)) + [1] * len(w.ids) for w in batch], device=device)

        def given_up(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done = [waiting.result.done() for waiting in batch]  # cancelled, or past its deadline
            return torch.tensor(done, device=tokens.device)

        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self._member.max_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            stopping_criteria=[given_up],
        )
        return [_until_end(row, ends) for row in output[:, width:].tolist()]

    async def aclose(self) -> None:
        if self._worker is not None and not self._worker.done():
            await self._worker
        self._worker = None


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids
