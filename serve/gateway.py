"""
The routes of the judge over HTTP: who may ask, what, and what is answered. docs/serving.md has the formats.

`make_app(Gate(judge))` is an application for any ASGI server; `python -m serve` starts one in front of vLLM.
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
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from judge.backends import Refused
from lib.files import Failure
from lib.pairs import Pair, messages_of, read_conversation, read_criteria
from rmr1 import all_of, as_json, as_written, groups_of, vote_as_json
from serve.groups import Busy, PendingGroups, check_votes
from serve.rendered import rendered_context, without_end

PAGE = Path(__file__).with_name("judge.html")
CLOSING = "the server is shutting down; ask again"
LOADING = "the judge is not ready yet; /health says when"

# ---------------------------------------------------------------- errors

# The type that a client reads, named as OpenAI's own clients name them, and what the status means here.
STATUSES = {
    400: ("BadRequestError", "bad input"),
    401: ("AuthenticationError", "no key, or a wrong one"),
    403: ("PermissionDeniedError", "another origin or host"),
    404: ("NotFoundError", "no such route"),
    405: ("MethodNotAllowedError", "the route has another method"),
    413: ("RequestTooLargeError", "too large"),
    415: ("UnsupportedMediaTypeError", "not JSON"),
    499: ("ClientClosedRequestError", "the caller has left"),
    500: ("InternalServerError", "a failure in one sentence, or a bug"),
    502: ("BadGatewayError", "the model's server refuses or is silent"),
    503: ("ServiceUnavailableError", "loading, closing or full"),
}
# The first that fits: Refused is a Failure.
STATUS_OF_ERROR = {ValueError: 400, Refused: 502, Busy: 503, Failure: 500, Exception: 500}


def say(message):
    """Write a line into the server's log."""
    print(time.strftime("%H:%M:%S"), message, file=sys.stderr, flush=True)


def error_body(status, message, param=None):
    """An error as vLLM's own server words it, so that clients of either read both."""
    kind, _ = STATUSES[status]
    return {"error": {"message": message[:1000], "type": kind, "param": param, "code": status}}


def error_response(status, message, param=None, headers=None):
    return JSONResponse(error_body(status, message, param), status, headers)


def status_and_message(error):
    """What a caller is told of an exception. A slip of the code tells nothing: its words may be secrets."""
    if isinstance(error, HTTPException):
        return error.status_code, error.detail
    status = next(status for kind, status in STATUS_OF_ERROR.items() if isinstance(error, kind))
    is_slip = status == 500 and not isinstance(error, Failure)
    return status, "internal error; the server's log says more" if is_slip else str(error)


def log_error(error):
    """Write an error of status 500 into the server's log: a failure's sentence, or a slip's traceback."""
    if isinstance(error, Failure):
        say(f"error: {error}")
    else:
        say("error\n" + "".join(traceback.format_exception(error)))


# ---------------------------------------------------------------- who may ask, and how much


class Guard:
    """Stands before every request: whose page it comes from, the key, the kind and size of its body."""

    def __init__(self, app, gate):
        self.app = app
        self.gate = gate

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = self.refusal(scope)
        if refusal:
            return await refusal(scope, receive, send)

        status = 0
        length = 0

        async def limited_receive():
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > self.gate.most_bytes:
                raise HTTPException(413, f"a request may have {self.gate.most_bytes:,} bytes")
            return message

        async def observed_send(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, limited_receive, observed_send)
        except (
            Failure
        ) as failure:  # passes the application's own handlers, which know `Exception` only
            status, message = status_and_message(failure)
            if status == 500:
                log_error(failure)
            await error_response(status, message)(scope, receive, send)
        finally:
            if status >= 500 and scope["path"] != "/health":
                route = getattr(scope.get("route"), "path", "other")
                say(f"{scope['method']} {route}: {status}")

    def refusal(self, scope):
        """The response to a request that is not let in, else None."""
        if scope["path"] == "/health":
            return None
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        host = headers.get("host", "")
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            return error_response(403, "asked from a page of another origin")
        if self.gate.key:
            if not has_key(headers.get("authorization", ""), self.gate.key):
                return error_response(
                    401,
                    "the key (RMR1_API_KEY of the server) is missing or wrong",
                    headers={"WWW-Authenticate": 'Basic realm="rmr1"'},
                )
        elif not is_own_host(host, self.gate.host):
            return error_response(
                403, f"host {host[:100]!r}: without a key, localhost and --host are answered"
            )
        media_type = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and media_type != "application/json":
            return error_response(415, "the body must be application/json")
        return None


def sha256(content):
    return hashlib.sha256(content).digest()


def has_key(authorization, key):
    """Whether an Authorization header has the key: as a bearer token, or as the password of any user."""
    kind, _, credentials = authorization.encode("latin-1").partition(b" ")
    if kind.lower() == b"basic":
        with suppress(ValueError):
            credentials = base64.b64decode(credentials).partition(b":")[2]
    # Digests have one length, so the time of the comparison tells nothing of the key.
    return hmac.compare_digest(sha256(credentials), sha256(key.encode()))


def is_own_host(host, own):
    """Whether a Host header names this machine: localhost, a loopback address, or the --host.

    Any other name may be a hostile page's own, which its DNS server has pointed here.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in ("localhost", own) or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------- requests

MOST_CHARACTERS = 4_000_000  # of a text


class Body(BaseModel):
    """What a request says. A number or a truth value written as a text is refused, not guessed.

    A field that we do not know is refused too: a system prompt beside the prompt would not be judged by. Prompts,
    responses and criteria may be anything here: `read_texts` and `criteria_of` read them, or say what is wrong.
    """

    model_config = ConfigDict(strict=True, extra="forbid")


class CompareRequest(Body):
    prompt: Any = None
    a: Any
    b: Any
    criteria: Any = None
    budget: int = Field(8, ge=1, le=64)
    stream: bool = False


class RankRequest(Body):
    prompt: Any = None
    responses: list = Field(min_length=2)
    criteria: Any = None
    goal: Literal["all", "best"] = "all"
    budget: int | None = Field(None, ge=1, le=4096)


class ScoreRequest(Body):
    prompt: Any = None
    response: Any
    criteria: Any = None
    samples: int = Field(4, ge=1, le=64)


class RewardRequest(Body):
    """Whole groups: prompts and completions. Or one sample, prompt and completion, with

    reference  a response to compare it with; or
    group      how many samples its group has
    rollout    an id of the sample, which makes retries harmless
    group_id   tells groups of one prompt apart

    criteria are of the whole request: samples that have others are of another group.
    """

    prompts: list | None = Field(None, max_length=4096)
    completions: list | None = Field(None, max_length=4096)
    prompt: Any = None
    completion: Any = None
    reference: Any = None
    criteria: Any = None
    group: int | None = Field(None, ge=2)
    rollout: str | None = Field(None, max_length=1000)
    group_id: str = Field("", max_length=1000)


class OpenRLHFRequest(Body):
    """query: prompt and response in one text. Of two reward URLs the second gets an empty query."""

    query: list[str] = Field(max_length=4096)
    prompts: list[str] = Field(max_length=4096)
    labels: list | None = None


def read_texts(prompt, responses, names):
    """The conversation of a request. -> context, [text of each response], notes on what was joined or renamed

    A prompt and responses have every form that `read_conversation` reads, but a response that is a text is taken
    word for word: it is what a policy wrote, which may look like anything.
    """
    notes = set()
    replies = [as_written(response) for response in responses]
    context, texts = read_conversation(prompt, replies, names=names, notes=notes)
    check_lengths([*texts, *(message["content"] for message in context)])
    return context, texts, {"notes": sorted(notes)} if notes else {}


def criteria_of(body):
    """The criteria of a request as the judge sees them, or None. Raises ValueError where they cannot be read."""
    criteria = read_criteria(body.criteria)
    check_lengths([criteria or ""])
    return criteria


def check_lengths(texts):
    longest = max(map(len, texts))
    if longest > MOST_CHARACTERS:
        raise ValueError(f"a text of {longest:,} characters; {MOST_CHARACTERS:,} at most")


def in_field(name, read, value):
    """What `read` makes of a field's value; its ValueError gets the field's name in front."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def usage(votes):
    """What votes cost this request: nothing for those from the journal, nor for those under way for another
    caller, who bears their tokens."""
    new = [vote.answer for vote in votes if vote.answer.origin == "new"]
    return {
        "judgments": len(votes),
        "cached": sum(vote.answer.origin == "cached" for vote in votes),
        "shared": sum(vote.answer.origin == "shared" for vote in votes),
        "prompt_tokens": sum(answer.prompt_tokens for answer in new),
        "completion_tokens": sum(answer.tokens for answer in new),
    }


# ---------------------------------------------------------------- the gateway


class Gate:
    """What the routes share, and the routes.

    judge          None until it is ready
    key            that every request but /health must have; "" or None for no key
    host           the address to listen at, which a request may name
    most           responses of one prompt at most
    most_bytes     bytes of a request at most
    group_size     samples of a prompt, where a trainer sends one at a time and its URL does not say
    group_timeout  seconds after its last sample at which a group is judged that is not whole
    """

    def __init__(
        self,
        judge=None,
        key=None,
        host="127.0.0.1",
        most=32,
        most_bytes=8 << 20,
        group_size=None,
        group_timeout=120.0,
    ):
        self.judge = judge
        self.key = key
        self.host = host
        self.most = most
        self.most_bytes = most_bytes
        self.group_size = group_size
        self.group_timeout = group_timeout
        self.upstream = None  # the model's server, where one is looked after
        self.pending_groups = None
        self.is_closing = False
        self.time_is_up = asyncio.Event()  # what is still under way ends now

    def is_ready(self):
        upstream_ready = self.upstream is None or self.upstream.is_ready
        return self.judge is not None and upstream_ready and not self.is_closing

    def close(self, grace):
        """Refuse new requests and open groups; what is under way has `grace` seconds."""
        say(f"closing; what is under way has {grace:g} s")
        self.is_closing = True
        asyncio.get_running_loop().call_later(grace, self.time_is_up.set)
        if self.pending_groups:
            self.pending_groups.close(CLOSING)

    def open_judge(self):
        """The judge. Raises HTTPException 503 where there is none."""
        if self.is_closing:
            raise HTTPException(503, CLOSING)
        if self.judge is None:
            raise HTTPException(503, LOADING)
        if self.pending_groups is None:
            self.pending_groups = PendingGroups(self.judge, self.group_timeout)
        return self.judge

    def check_count(self, count, budget=None):
        """Raises HTTPException 413 if a prompt has too many responses, and says what they would cost."""
        if count > self.most:
            raise HTTPException(
                413,
                f"{count} responses: {self.most} of one prompt are compared at most; "
                f"these would ask for up to {budget or 4 * count} judgments",
            )

    async def result(self, work, request=None):
        """The result of a coroutine, which is cancelled if its caller (`request`) leaves or time is up.

        Raises HTTPException 503 or 499 then.
        """
        work_task = asyncio.ensure_future(work)
        closing_task = asyncio.ensure_future(self.time_is_up.wait())
        tasks = [work_task, closing_task]
        if request is not None:
            leaving_task = asyncio.ensure_future(caller_leaves(request))
            tasks.append(leaving_task)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if work_task.done():
                return work_task.result()
            if closing_task.done():
                raise HTTPException(503, CLOSING)
            raise HTTPException(499, "the caller has left")
        finally:
            for task in tasks:
                task.cancel()

    async def compare(self, body: CompareRequest, request: Request):
        context, (a, b), notes = read_texts(body.prompt, [body.a, body.b], ["a", "b"])
        pair = Pair("", context, a, b, None, criteria=criteria_of(body))
        judge = self.open_judge()
        if body.stream:
            return StreamingResponse(
                comparison_events(self, judge, pair, body.budget, notes),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store"},
            )
        work = judge.acompare(pair, budget=body.budget)
        return comparison_body(await self.result(work, request), pair) | notes

    async def rank(self, body: RankRequest, request: Request):
        self.check_count(len(body.responses), body.budget)
        names = [f"responses[{n}]" for n in range(len(body.responses))]
        context, texts, notes = read_texts(body.prompt, body.responses, names)
        replies = [as_written(text) for text in texts]
        criteria = criteria_of(body)
        work = self.open_judge().arank(context, replies, body.goal, body.budget, criteria)
        ranked = await self.result(work, request)
        check_votes(ranked.votes)
        comparisons = [
            {
                "first": vote.first,
                "second": vote.second,
                "verdict": vote.verdict,
                "reason": vote.judgment.reason,
                "decided_by": vote.judgment.decided_by,
            }
            for vote in ranked.votes
        ]
        return {
            "ranking": ranked.order,
            **ranked.numbers(),
            "criteria": ranked.criteria,
            "usage": usage(ranked.judgments),
            "comparisons": comparisons,
            **notes,
        }

    async def score(self, body: ScoreRequest, request: Request):
        context, (text,), notes = read_texts(body.prompt, [body.response], ["response"])
        criteria = criteria_of(body)
        work = self.open_judge().ascore(context, as_written(text), criteria, body.samples)
        found = await self.result(work, request)
        numbers = {name: getattr(found, name) for name in ("score", "stderr", "met", "reason")}
        return numbers | {"usage": usage(check_votes(found.votes))} | notes

    async def reward(self, body: RewardRequest, request: Request):
        is_sample = body.prompt is not None and body.completion is not None
        if is_sample and body.reference is not None:
            return await self.reward_against_reference(body, request)
        if is_sample and body.group:
            if isinstance(body.completion, str):  # may be empty: it gets no reward
                sample = messages_of(body.prompt), body.completion
            else:
                context, (text,), _ = read_texts(body.prompt, [body.completion], ["completion"])
                sample = context, text
            results = await self.reward_samples(
                request,
                [sample],
                body.group,
                body.rollout or None,
                body.group_id,
                criteria_of(body),
            )
            reward, stderr = results[0]
            return {"reward": reward, "stderr": stderr}

        prompts, completions = body.prompts, body.completions
        if prompts is None or completions is None or len(prompts) != len(completions):
            raise ValueError(
                "give prompts and completions, as many of each; or prompt and completion, and "
                "either group, how many samples the prompt has, or reference, to compare with"
            )
        if body.prompt is not None or body.completion is not None:
            raise ValueError("give prompts and completions, or prompt and completion, but not both")
        notes = set()
        read_prompt = partial(messages_of, notes=notes)
        contexts = [in_field(f"prompts[{n}]", read_prompt, p) for n, p in enumerate(prompts)]
        for n, (context, completion) in enumerate(zip(contexts, completions)):
            if not isinstance(completion, str | list | dict):
                raise ValueError(f"completions[{n}] is not a text or messages")
            with suppress(ValueError):  # one that is empty or no reply gets no reward
                read_conversation(context, [as_written(completion)], notes=notes)
        if any(len(group) == 1 for _, group, _ in groups_of(contexts, completions)):
            notes.add("a completion that is alone: those of one prompt stand in a row")
        criteria = criteria_of(body)
        results = await self.reward_groups(request, contexts, completions, criteria)
        answer = {
            "rewards": [reward for reward, _ in results],
            "stderr": [stderr for _, stderr in results],
        }
        return answer | ({"notes": sorted(notes)} if notes else {})

    async def reward_against_reference(self, body, request):
        context, (a, b), notes = read_texts(
            body.prompt, [body.completion, body.reference], ["completion", "reference"]
        )
        pair = Pair("", context, a, b, None, criteria=criteria_of(body))
        work = self.open_judge().acompare(pair)
        comparison = await self.result(work, request)
        return {
            "reward": comparison.win if comparison.verdict else None,
            "usage": usage(check_votes(comparison.votes)),
            **notes,
        }

    async def reward_groups(self, request, contexts, completions, criteria=None):
        """[(reward, standard error), ...] of whole groups: runs of equal prompts."""
        judge = self.open_judge()
        groups = groups_of(contexts, completions, criteria)
        for _, responses, _ in groups:
            self.check_count(len(responses))
        work = all_of(judge.agroup(*group) for group in groups)
        results = await self.result(work, request)
        check_votes([vote for _, votes in results for vote in votes])
        return [reward for rewards, _ in results for reward in rewards]

    async def reward_samples(
        self, request, samples, size, sample_id=None, group_id="", criteria=None
    ):
        """[(reward, standard error), ...] of samples that wait for the rest of their groups.

        samples  [(chat messages, response), ...]
        """
        self.check_count(size)
        self.open_judge()
        work = all_of(
            self.pending_groups.reward(context, response, size, sample_id, group_id, criteria)
            for context, response in samples
        )
        return await self.result(work, request)

    async def get_reward(
        self,
        body: OpenRLHFRequest,
        request: Request,
        group_id: str = "",
        group: Annotated[int | None, Query(ge=2)] = None,
        criteria: str | None = None,
    ):
        criteria = read_criteria(criteria)
        queries, prompts = body.query, body.prompts
        if not queries and not prompts:
            return {"rewards": [], "scores": [], "extra_logs": {}}
        if len(prompts) != len(queries) or not all(map(str.startswith, queries, prompts)):
            raise ValueError("each query must be its prompt and the response after it")
        contexts = [in_field(f"prompts[{n}]", rendered_context, p) for n, p in enumerate(prompts)]
        responses = [without_end(query[len(prompt) :]) for query, prompt in zip(queries, prompts)]

        size = group or self.group_size
        if size:
            samples = list(zip(contexts, responses))
            results = await self.reward_samples(
                request, samples, size, group_id=group_id, criteria=criteria
            )
        elif len(responses) == 1:
            raise ValueError(
                "one sample: say how many a prompt has, by ?group=8 in the URL or --group-size 8"
            )
        else:
            results = await self.reward_groups(request, contexts, responses, criteria)

        rewards = [reward for reward, _ in results]
        if all(reward is None for reward in rewards):  # as OpenRLHF reads a call that has failed
            return {"rewards": None, "scores": None, "extra_logs": {}}
        stderr = [stderr for _, stderr in results]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"stderr": stderr}}


async def caller_leaves(request):
    """Wait until the caller of a request has hung up. Its body must have been read."""
    message = await request.receive()
    while message["type"] != "http.disconnect":
        message = await request.receive()


def comparison_body(comparison, pair):
    return as_json(comparison, pair) | {"usage": usage(check_votes(comparison.votes))}


def event_text(name, data):
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def comparison_events(gate, judge, pair, budget, notes):
    """A comparison as server-sent events: `vote` for each vote that is whole, then `done` or `error`."""
    loop = asyncio.get_running_loop()
    queue = asyncio.Queue()  # (number, vote), and None at the end

    def on_vote(number, vote):
        # A backend may report from a thread of its own.
        loop.call_soon_threadsafe(queue.put_nowait, (number, vote))

    work = judge.acompare(pair, budget=budget, on_vote=on_vote)
    task = asyncio.ensure_future(gate.result(work))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while True:
            item = await queue.get()
            if item is None:
                break
            number, vote = item
            yield event_text("vote", {"number": number} | vote_as_json(vote, pair))
        yield event_text("done", comparison_body(task.result(), pair) | notes)
    except (Exception, Failure) as error:
        status, message = status_and_message(error)
        if status == 500:
            log_error(error)
        yield event_text("error", error_body(status, message))
    finally:
        task.cancel()  # the caller may have left


# ---------------------------------------------------------------- the application


def make_app(gate):
    """An application for any ASGI server."""
    app = FastAPI(
        title="rmr1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={status: {"description": meaning} for status, (_, meaning) in STATUSES.items()},
    )
    app.add_middleware(Guard, gate=gate)

    page = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": page_policy(page)}

    @app.api_route("/", methods=["GET", "HEAD"], response_class=Response)
    async def show_page():
        return Response(page, media_type="text/html", headers=headers)

    @app.api_route("/health", methods=["GET", "HEAD"], response_class=Response)
    async def health():
        return Response(status_code=200 if gate.is_ready() else 503)

    app.post("/compare")(gate.compare)
    app.post("/rank")(gate.rank)
    app.post("/score")(gate.score)
    app.post("/reward")(gate.reward)
    app.post("/get_reward")(gate.get_reward)

    app.exception_handler(RequestValidationError)(answer_invalid)
    for kind in (HTTPException, ValueError, Busy, Exception):
        app.exception_handler(kind)(answer_error)
    return app


def page_policy(page):
    """The Content-Security-Policy of the page: its own script and style by their hashes, and nothing else."""

    def source(tag):
        block = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        return f"'sha256-{base64.b64encode(sha256(block.encode())).decode()}'"

    return (
        f"default-src 'none'; connect-src 'self'; script-src {source('script')}; "
        f"style-src {source('style')}; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def answer_invalid(_, error):
    """The response to a body that does not fit: what its first error is, and where."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return error_response(400, reason)
    param = ".".join(map(str, first["loc"][1:]))
    return error_response(400, f"{param or 'body'}: {first['msg']}", param)


def answer_error(_, error):
    status, message = status_and_message(error)
    return error_response(status, message, headers=getattr(error, "headers", None))
