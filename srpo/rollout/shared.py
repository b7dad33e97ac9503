"""A trained policy for many episodes at once: read from its checkpoint, and one thread that owns the model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from srpo.policy_name import named_policy
from srpo.rollout.turns import Generator, Request, Sample


class Batches:
    """One thread that owns the model: turns that wait at the same time are generated together."""

    def __init__(self, generator: Generator, size: int) -> None:
        self._generator = generator
        self._size = size
        self._waiting: queue.Queue[tuple[Request, Future[Sample]] | None] = queue.Queue()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="router-model", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Sample]:
        """A future of the turn.

        Raises:
            RuntimeError: closed.
        """
        return self._put([request])[0]

    def ask(self, requests: Sequence[Request]) -> list[Sample]:
        """`submit` for several, which are generated together, and wait for them."""
        return [future.result() for future in self._put(requests)]

    def _put(self, requests: Sequence[Request]) -> list[Future[Sample]]:
        futures: list[Future[Sample]] = [Future() for _ in requests]
        with self._lock:
            if self._closed:
                raise RuntimeError("the policy was closed")
            for item in zip(requests, futures, strict=True):
                self._waiting.put(item)
        return futures

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            with self._lock:  # whoever asks for several has put them all
                while len(batch) < self._size and not self._waiting.empty():
                    item = self._waiting.get()
                    if item is None:
                        self._waiting.put(None)  # closes after this batch
                        break
                    batch.append(item)
            batch = [item for item in batch if item[1].set_running_or_notify_cancel()]
            try:
                samples = self._generator.generate([request for request, _ in batch])
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), sample in zip(batch, samples, strict=True):
                future.set_result(sample)


def find_file(name: str, file: str) -> Path | None:
    """A file of a checkpoint, downloaded if need be; None: it has no such file.

    Args:
        name: a folder or Hub id.
        file: its name in there.

    Raises:
        OSError: no such checkpoint.
    """
    with named_policy(name):
        return _cached(name, file)


def _cached(name: str, file: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def load_checkpoint(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or Hub id, full weights or LoRA adapter.

    The model is in evaluation mode, and on the GPU if there is one.

    Raises:
        OSError: no such checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with named_policy(name):
        if _cached(name, "adapter_config.json"):
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer
