"""A loopback server that samples from a real tiny MoE and answers as vLLM and SGLang do, routed experts included.

The forms are those of the engines' documentation and pull requests (see `srpo.replay.engines`); dense layers of an
all-layers table hold zeros, as the engines' buffers do.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
import torch
from moe_families import sampled
from torch import Tensor

from srpo.replay.replay import RoutingReplay


class EngineServer:
    """`form` says how routes are sent; `spoil` changes them before. `bodies` are the requests that came."""

    def __init__(self, model: Any, form: str = "npy", all_layers: bool = True, shared: int = 0) -> None:
        self.model, self.replay = model, RoutingReplay(model)
        self.form, self.all_layers, self.shared = form, all_layers, shared
        self.enabled = True
        self.spoil: Any = lambda table: table
        self.bodies: list[dict[str, Any]] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                engine.bodies.append(body)
                status, answer = engine.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> EngineServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sample(self, prompt: list[int], new: int, seed: int) -> tuple[list[int], list[float], Tensor]:
        """(ids, log-probabilities, [P + G - 1, layers, columns] as the engine's buffers hold them)."""
        _, (routes,), (sample,), _ = sampled(self.model, self.replay, [prompt], new, seed=seed)
        spec, table = self.replay.spec, routes[:-1].int()
        if self.shared:
            extra = spec.num_experts + torch.arange(self.shared, dtype=torch.int32)
            table = torch.cat([table, extra.expand(*table.shape[:2], -1)], dim=-1)
        if self.all_layers:
            buffer = torch.zeros(len(table), spec.num_layers, table.shape[-1], dtype=torch.int32)
            buffer[:, list(spec.layers)] = table
            table = buffer
        return list(sample.ids), list(sample.logprobs), self.spoil(table)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/v1/completions":
            return 200, self.vllm(body)
        if path == "/generate":
            if not self.enabled and body["return_routed_experts"]:
                return 200, self.sglang(body | {"return_routed_experts": False})
            return 200, self.sglang(body)
        return 404, {"error": f"no route {path}"}

    def vllm(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, choices, response = body["prompt"], [], {}
        for index in range(body.get("n", 1)):
            ids, logprobs, table = self.sample(prompt, body["max_tokens"], seed=index)
            choice: dict[str, Any] = {"index": index, "token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
            if not self.enabled:
                choice["routed_experts"] = None
            elif self.form == "npy":  # 0.22 and later
                file = io.BytesIO()
                numpy.save(file, table.numpy())
                choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
            else:  # 0.21: nested lists, the prompt's apart, and a row for the last token too
                response["prompt_routed_experts"] = table[: len(prompt)].tolist()
                choice["routed_experts"] = torch.cat([table[len(prompt) :], table[-1:]]).tolist()
            choices.append(choice)
        return response | {"choices": choices}

    def sglang(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["input_ids"]
        ids, logprobs, table = self.sample(prompt, body["sampling_params"]["max_new_tokens"], seed=0)
        pairs = [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]
        meta: dict[str, Any] = {"output_token_logprobs": pairs, "prompt_tokens": len(prompt)}
        if body["return_routed_experts"]:
            rows = table[body["routed_experts_start_len"] :].numpy().astype("<i4")
            meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        return {"text": "", "output_ids": ids, "meta_info": meta}
