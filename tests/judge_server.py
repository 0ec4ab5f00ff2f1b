"""A server on 127.0.0.1 that speaks the chat-completions protocol, by itself or as a proxy of a real one,
and fails on command."""

import json
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def sections(prompt: str) -> tuple[str, str]:
    """Summary A and summary B of a prompt made from rlhf/prompts/tldr.txt."""
    a, b = prompt.split("### Summary A:\n")[1].split("\n\n### Summary B:\n")
    return a, b.split("\n\n### Instructions:")[0]


def alphabetic(prompt: str) -> str:
    """A judge without a liking for a position: the text that sorts first is the better one."""
    a, b = sections(prompt)
    return f'Comparison: one sorts before the other.\nPreferred: "{"A" if a < b else "B"}"'


class JudgeServer:
    """`with JudgeServer(answer, fault) as server`: judge_url=server.url.

    answer(prompt) -> text      what the model says; or upstream="http://...": a real server says it
    fault(prompt, attempt)      None, or what goes wrong at this attempt (counted from 0 per prompt):
                                "429" (Retry-After), "500", "slow", "cut", "drop", "garbage", "refusal",
                                "echo key", or an int: that status
    answered, requests, connections at a time are counted; `log` holds (time, prompt, what happened).
    """

    def __init__(
        self,
        answer=alphabetic,
        fault=lambda prompt, attempt: None,
        upstream: str = "",
        delay: float = 0.0,
        retry_after: str = "0.3",
    ):
        self.answer, self.fault, self.upstream, self.delay, self.retry_after = (
            answer,
            fault,
            upstream,
            delay,
            retry_after,
        )
        self.answered, self.requests, self.log, self.lock, self.busy, self.most_busy = (
            Counter(),
            Counter(),
            [],
            threading.Lock(),
            0,
            0,
        )
        self.bodies = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer.serve(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, client_address):
                pass  # a client that gave up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def serve(self, handler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        prompt = json.loads(body)["messages"][-1]["content"]
        with self.lock:
            attempt = self.requests[prompt]
            self.requests[prompt] += 1
            self.bodies.append(json.loads(body))
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        kind = self.fault(prompt, attempt)
        self.log.append((time.time(), prompt, kind))
        try:
            time.sleep(self.delay)
            self.reply(handler, body, prompt, kind)
        finally:
            with self.lock:
                self.busy -= 1

    def reply(self, handler, body: bytes, prompt: str, kind) -> None:
        if kind == "drop":
            handler.close_connection = True
            handler.connection.close()
        elif kind == "429":
            send(
                handler,
                429,
                {"error": {"message": "slow down", "code": "rate_limit_exceeded"}},
                {"Retry-After": self.retry_after},
            )
        elif kind == "quota":
            send(handler, 429, {"error": {"message": "pay first", "code": "insufficient_quota"}})
        elif kind == "echo key":
            send(
                handler,
                401,
                {
                    "error": {
                        "message": f"who is {handler.headers['Authorization']}?",
                        "code": "invalid_api_key",
                    }
                },
            )
        elif kind == "filtered":
            send(handler, 400, {"error": {"message": "not that", "code": "content_filter"}})
        elif kind == "500" or isinstance(kind, int):
            send(handler, int(kind), {"error": {"message": "broken"}})
        elif kind == "garbage":
            send(handler, 200, b'{"choices": [{"message": {"content": "Preferred: A')
        elif kind == "refusal":
            self.answered[prompt] += 1
            send(handler, 200, completion(None, refusal="I cannot compare these."))
        else:
            if kind == "slow":
                time.sleep(1.5)
            data = (
                self.ask_upstream(handler, body)
                if self.upstream
                else json.dumps(completion(self.answer(prompt))).encode()
            )
            if kind == "cut":
                send(handler, 200, data, cut=len(data) // 2)
            else:
                send(handler, 200, data)
                self.answered[prompt] += kind != "slow"

    def ask_upstream(self, handler, body: bytes) -> bytes:
        request = urllib.request.Request(
            self.upstream + "/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read()


def completion(content: str | None, **message) -> dict:
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": content, **message},
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}


def send(handler, status: int, content: dict | bytes, headers: dict | None = None, cut: int = 0) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        **(headers or {}),
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data[: cut or None])
    if cut:
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.close()
