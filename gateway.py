"""
The routes of the judge over HTTP: who may ask, what, and what is answered. docs/serving.md has the formats.

`app_of(Gate(judge))` is an application for any ASGI server; serve.py starts one in front of vLLM.
"""
import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import prometheus_client as prom
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from askers import Refused
from cohorts import Busy, Cohorts, checked
from files import digest
from rmr1 import all_of, as_json, groups_of, judgment_as_json, vote_as_json
from rubrics import Pair, messages_of, parse, response_of

PAGE = Path(__file__).with_name("assets") / "judge.html"
CLOSING, LOADING = "the server is shutting down; ask again", "the judge is not ready yet; /health says when"
REFUSALS = {400: "bad input", 401: "no key, or a wrong one", 403: "another origin or host", 413: "too large",
            415: "not JSON", 502: "the model's server refuses or is silent", 503: "loading, closing or full"}
FAILURES = {ValueError: 400, Refused: 502, Busy: 503, Exception: 500}


def say(text):
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def error(status, message, param=None):
    """What a caller is told when it goes wrong, in vLLM's form."""
    kind = {400: "BadRequestError", 401: "Unauthorized", 404: "NotFoundError"}.get(status, "Error")
    return {"error": {"message": message[:1000], "type": kind, "param": param, "code": status}}


def failed(e):
    """An exception as what a caller is told."""
    if isinstance(e, HTTPException):
        return error(e.status_code, e.detail)
    return error(next(status for kind, status in FAILURES.items() if isinstance(e, kind)), str(e))


def reply(told, headers=None):
    return JSONResponse(told, told["error"]["code"], headers)


# ---------------------------------------------------------------- who may ask, and how much

def hash_of(key):
    return hashlib.sha256(key).digest()


class Guard:
    """Stands before every request: whose page it comes from, the key, the kind and size of its body."""

    def __init__(self, app, gate):
        self.app, self.gate = app, gate

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        start, status, length = time.monotonic(), 0, 0

        async def limited():
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > self.gate.most_bytes:
                raise HTTPException(413, f"a request may have {self.gate.most_bytes:,} bytes")
            return message

        async def noted(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        app, refusal = self.app, self.refusal(scope, headers)
        if refusal:
            status, why = refusal
            headers = {"WWW-Authenticate": 'Basic realm="rmr1"'} if status == 401 else None
            app = reply(error(status, why), headers)
        try:
            await app(scope, limited, noted)
        finally:
            self.gate.count(scope, status, time.monotonic() - start)

    def refusal(self, scope, headers):
        """-> (status, why), or None"""
        if scope["path"] == "/health":
            return None
        host = headers.get("host", "")
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            return 403, "asked from a page of another origin"
        if self.gate.key:
            kind, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
            if kind.lower() == b"basic":
                with suppress(ValueError):
                    given = base64.b64decode(given).partition(b":")[2]
            if not hmac.compare_digest(hash_of(given), hash_of(self.gate.key.encode())):
                return 401, "the key (RMR1_API_KEY of the server) is missing or wrong"
        elif not is_local(host, self.gate.host):            # a name that another's DNS has pointed here
            return 403, f"host {host[:100]!r}: without a key, an address, localhost or --host is answered"
        media = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and media != "application/json":
            return 415, "the body must be application/json"


def is_local(host, ours):
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        if name in ("localhost", ours):
            return True
        return bool(ipaddress.ip_address(name))
    return False


# ---------------------------------------------------------------- what is asked

Text = Annotated[str, Field(max_length=4_000_000)]


class Message(BaseModel):
    role: str
    content: Text


Prompt = Text | list[Message]


class ToCompare(BaseModel):
    prompt: Prompt
    a: Text
    b: Text
    budget: int = Field(8, ge=1, le=64)
    stream: bool = False


class ToRank(BaseModel):
    prompt: Prompt
    responses: list[Text] = Field(min_length=2)
    goal: Literal["all", "best"] = "all"
    budget: int | None = Field(None, ge=1, le=4096)


class ToReward(BaseModel):
    """prompts and completions; or a sample: prompt and completion, and either its group's size (with an id
    that makes retries harmless, and the name of a cohort) or a reference to be compared with."""
    prompts: list[Prompt] | None = Field(None, max_length=4096)
    completions: list[Text] | None = Field(None, max_length=4096)
    prompt: Prompt | None = None
    completion: Text | None = None
    group: int | None = Field(None, ge=2)
    rollout: str | None = Field(None, max_length=1000)
    cohort: str = Field("", max_length=1000)
    reference: Text | None = None


class ToRerank(BaseModel):
    query: Text
    documents: list[Text | dict[str, Text]] = Field(min_length=1)
    model: str | None = None
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


class ToGetReward(BaseModel):
    query: list[Text] = Field(max_length=4096)           # OpenRLHF's for the second of two URLs has none
    prompts: list[Text]
    labels: list | None = None


def context_of(prompt):
    """A prompt as `messages_of` has it; one that OpenRLHF has put into a chat template, taken apart again."""
    if isinstance(prompt, list):
        return messages_of([m.model_dump() for m in prompt])
    _, *parts = TURN.split(prompt)
    turns = [(role, END.split(text, maxsplit=1)) for role, text in zip(parts[::2], parts[1::2])]
    # One without an end is the response's.
    return messages_of([{"role": role, "content": said} for role, (said, *end) in turns if end] or prompt)


def without_end(response):
    """A response without the tokens that end it. In linear time, as all that reads such texts must be."""
    end, tokens = len(response), [*END.finditer(response)]
    while tokens and not response[tokens[-1].end():end].strip():
        end = tokens.pop().start()
    return response[:end]


# ChatML and Llama 3; and the tokens that end a response.
TURN = re.compile(r"(?:<\|im_start\|>|<\|start_header_id\|>)(\w+)(?:<\|end_header_id\|>)?\n+")
END = re.compile(r"<\|(?:im_end|eot_id|endoftext|end_of_text)\|>|</s>|<｜end▁of▁sentence｜>")
CLOSED = re.compile(r"</(type|rubric|solution|eval|quote_A|quote_B|answer)>")


def usage(votes):
    """What votes cost. Those from the journal cost nothing, those that another caller asked for cost him."""
    new = [v.answer for v in votes if v.answer.origin == "new"]
    return {"judgments": len(votes), "cached": sum(v.answer.origin == "cached" for v in votes),
            "shared": sum(v.answer.origin == "shared" for v in votes),
            "prompt_tokens": sum(a.prompt_tokens for a in new),
            "completion_tokens": sum(a.tokens for a in new)}


# ---------------------------------------------------------------- the gateway

class Gate:
    """What the routes share. judge is None until it is ready; over ends when time to close is up."""

    def __init__(self, judge=None, key=None, host="127.0.0.1", most=32, most_bytes=8 << 20, group=None,
                 group_timeout=120.0):
        self.judge, self.upstream, self.cohorts = judge, None, None
        self.key, self.host, self.most, self.most_bytes = key, host, most, most_bytes
        self.group, self.group_timeout, self.closing, self.over = group, group_timeout, False, asyncio.Event()
        self.metrics = prom.CollectorRegistry()
        meter = lambda kind, name, about, *labels: kind(f"rmr1_{name}", about, labels, registry=self.metrics)
        self.requests = meter(prom.Counter, "requests", "answered requests", "path", "status")
        self.seconds = meter(prom.Histogram, "request_seconds", "time to an answer", "path")
        meter(prom.Gauge, "waiting_samples", "samples that wait for their group").set_function(
            lambda: self.cohorts.waiting if self.cohorts else 0)
        for name, about in (("judgments", "that the model wrote"), ("cached", "judgments from the journal"),
                            ("prompt_tokens", "that it read"), ("completion_tokens", "that it wrote")):
            meter(prom.Gauge, name, about).set_function(
                lambda name=name: self.judge.used[name] if self.judge else 0)

    def ready(self):
        return bool(self.judge and not self.closing and (self.upstream is None or self.upstream.ready))

    def count(self, scope, status, seconds):
        path = getattr(scope.get("route"), "path", "other")      # paths that there are: labels must be few
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)
        if status >= 500 and path != "/health":
            say(f"{scope['method']} {path}: {status}")

    async def result(self, work, request=None):
        """What `work` comes to, unless the time to close is up, or who asked for it (`request`) leaves."""
        async def left():
            while (await request.receive())["type"] != "http.disconnect":
                pass
        tasks = [asyncio.ensure_future(x) for x in (work, self.over.wait(), *([left()] if request else []))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                return tasks[0].result()
            raise HTTPException(*(503, CLOSING) if self.over.is_set() else (499, "the caller has left"))
        finally:
            for task in tasks:
                task.cancel()

    def close(self, grace):
        """No new samples or questions; what is under way has `grace` seconds."""
        say(f"closing; what is under way has {grace:g} s")
        self.closing = True
        asyncio.get_running_loop().call_later(grace, self.over.set)
        if self.cohorts:
            self.cohorts.close(CLOSING)

    def open_judge(self):
        """The judge, or why there is none. HTTPException 503."""
        if self.judge is None or self.closing:
            raise HTTPException(503, CLOSING if self.closing else LOADING)
        self.cohorts = self.cohorts or Cohorts(self.judge, self.group_timeout)
        return self.judge

    def limit(self, n, budget=None):
        if n > self.most:
            raise HTTPException(413, f"{n} responses: {self.most} of one prompt are compared at most; these "
                                     f"would ask for up to {budget or 4 * n} judgments")

    async def compare(self, body: ToCompare, request: Request):
        pair = Pair("", context_of(body.prompt), response_of(body.a), response_of(body.b), None)
        judge = self.open_judge()
        ask = lambda heard=None: judge.acompare(pair.context, pair.a, pair.b, body.budget, heard)
        if body.stream:
            return StreamingResponse(streamed(self, ask, pair), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store"})
        found = await self.result(ask(), request)
        return as_json(found, pair) | {"usage": usage(checked(found.votes))}

    async def rank(self, body: ToRank, request: Request):
        self.limit(len(body.responses), body.budget)
        ranked = await self.result(self.open_judge().arank(
            context_of(body.prompt), body.responses, body.goal, body.budget), request)
        comparisons = [{"first": v.first, "second": v.second, "verdict": v.verdict,
                        "reason": v.judgment.reason} for v in ranked.votes]
        return {"ranking": ranked.order, **ranked.numbers(), "usage": usage(checked(ranked.votes)),
                "comparisons": comparisons}

    async def reward(self, body: ToReward, request: Request):
        one = body.prompt is not None and body.completion is not None
        if one and body.reference is not None:
            found = await self.result(self.open_judge().acompare(
                context_of(body.prompt), body.completion, body.reference), request)
            return {"reward": found.win if found.verdict else None, "usage": usage(checked(found.votes))}
        if one and body.group:
            (r, stderr), = await self.samples(request, [(body.prompt, body.completion)], body.group,
                                              body.rollout, body.cohort)
            return {"reward": r, "stderr": stderr}
        if body.prompts is None or body.completions is None or len(body.prompts) != len(body.completions):
            raise ValueError("give prompts and completions, as many of each; or prompt and completion, and "
                             "either group, how many samples the prompt has, or reference, to compare with")
        rewards = await self.groups(request, body.prompts, body.completions)
        return {"rewards": [r for r, _ in rewards], "stderr": [e for _, e in rewards]}

    async def groups(self, request, prompts, completions):
        """Rewards of whole groups, which stand in a row."""
        judge = self.open_judge()
        runs = groups_of([context_of(p) for p in prompts], completions)
        for _, some in runs:
            self.limit(len(some))
        found = await self.result(all_of(judge.agroup(*run) for run in runs), request)
        checked([v for _, votes in found for v in votes])
        return [both for some, _ in found for both in some]

    async def samples(self, request, some, size, id=None, name=""):
        """Rewards of samples that wait for the rest of their groups."""
        self.limit(size)
        self.open_judge()
        return await self.result(
            all_of(self.cohorts.reward(context_of(p), c, size, id, name) for p, c in some), request)

    async def get_reward(self, body: ToGetReward, request: Request, cohort: str = "",
                         group: Annotated[int | None, Query(ge=2)] = None):
        if len(body.prompts) != len(body.query) or not all(map(str.startswith, body.query, body.prompts)):
            raise ValueError("each query must be its prompt and the response after it")
        responses = [without_end(q[len(p):]) for q, p in zip(body.query, body.prompts)]
        size = group or self.group
        if not responses:
            return {"rewards": [], "scores": [], "extra_logs": {}}
        if size is None and len(body.query) == 1:
            raise ValueError("one sample: say how many a prompt has, by ?group=8 in the URL or --group 8")
        some = await (self.samples(request, list(zip(body.prompts, responses)), size, None, cohort)
                      if size else self.groups(request, body.prompts, responses))
        rewards, stderr = ([x[i] for x in some] for i in (0, 1))
        known = any(r is not None for r in rewards)            # without one: as if the call had failed
        return {"rewards": rewards if known else None, "scores": rewards if known else None,
                "extra_logs": {"stderr": stderr} if known else {}}

    async def rerank(self, body: ToRerank, request: Request):
        texts = [d if isinstance(d, str) else d.get("text", "") for d in body.documents]
        self.limit(len(texts))
        some, votes = await self.result(self.open_judge().agroup(context_of(body.query), texts), request)
        rewards, used = [0.5] if len(texts) == 1 else [r for r, _ in some], usage(checked(votes))
        scores, silent = [r or 0.0 for r in rewards], rewards.count(None)
        results = [{"index": i, "relevance_score": scores[i]} | (
            {"document": {"text": texts[i]}} if body.return_documents else {})
            for i in sorted(range(len(texts)), key=lambda i: -scores[i])[:body.top_n]]
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        if silent:
            meta["warnings"] = [f"{silent} documents are empty or could not be judged: score 0"]
        tokens = {"prompt_tokens": used["prompt_tokens"],
                  "total_tokens": used["prompt_tokens"] + used["completion_tokens"]}
        return {"id": f"rerank-{digest([body.query, texts])}", "model": body.model or "rm-r1",
                "results": results, "usage": tokens, "meta": meta}


def app_of(gate):
    """An application for any ASGI server."""
    app = FastAPI(title="rmr1", docs_url=None, redoc_url=None, redirect_slashes=False,
                  responses={status: {"description": about} for status, about in REFUSALS.items()})
    app.add_middleware(Guard, gate=gate)
    page = PAGE.read_text()
    hashes = {tag: " ".join(f"'sha256-{base64.b64encode(hash_of(text.encode())).decode()}'" for text in
                            re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)) for tag in ("script", "style")}
    policy = (f"default-src 'none'; connect-src 'self'; script-src {hashes['script']}; "
              f"style-src {hashes['style']}; "
              "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    plain = {"/": lambda: Response(page, media_type="text/html", headers={"Content-Security-Policy": policy}),
             "/health": lambda: Response(status_code=200 if gate.ready() else 503),
             "/metrics": lambda: Response(prom.generate_latest(gate.metrics),
                                          media_type=prom.CONTENT_TYPE_LATEST)}
    for path, route in plain.items():
        app.api_route(path, methods=["GET", "HEAD"], response_class=Response)(route)
    for path, route in {"/compare": gate.compare, "/rank": gate.rank, "/reward": gate.reward,
                        "/get_reward": gate.get_reward, "/rerank": gate.rerank, "/v1/rerank": gate.rerank,
                        "/v2/rerank": gate.rerank}.items():
        app.post(path)(route)

    def invalid(_, e):
        first = e.errors()[0]
        param = ".".join(map(str, first["loc"][1:]))
        return reply(error(400, f"{param or 'body'}: {first['msg']}", param))

    app.exception_handler(RequestValidationError)(invalid)
    for kind in (HTTPException, *FAILURES):
        app.exception_handler(kind)(lambda _, e: reply(failed(e), getattr(e, "headers", None)))
    return app


async def streamed(gate, ask, pair):
    """A comparison as server-sent events, while it is written."""
    queue, loop, before, orders = asyncio.Queue(), asyncio.get_running_loop(), {}, ("AB", "BA")
    heard = lambda *what: loop.call_soon_threadsafe(queue.put_nowait, what)
    event = lambda name, **data: f"event: {name}\ndata: {json.dumps(data)}\n\n"
    task = asyncio.ensure_future(gate.result(ask(heard)))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while item := await queue.get():
            k, first, what = item
            if not isinstance(what, str):
                yield event("end", vote=k, **vote_as_json(what, pair))
                continue
            had = before.get(k, "")
            if k not in before or not what.startswith(had):      # it begins, or begins again
                had = ""
                yield event("start", vote=k, order=orders[first])
            before[k] = what
            if new := what[len(had):]:
                yield event("text", vote=k, text=new)
            if any(m.end() > len(had) for m in CLOSED.finditer(what, max(0, len(had) - 12))):
                yield event("judgment", vote=k, judgment=judgment_as_json(parse(what, False), pair, first))
        found = task.result()
        yield event("done", **as_json(found, pair), usage=usage(checked(found.votes)))
    except Exception as e:
        yield event("error", **failed(e))
    finally:
        task.cancel()
