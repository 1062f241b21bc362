"""
Who answers a request: a model in this process, a server, or a reward model that gives a number; and their flags.

A request is (messages, seed, temperature), where temperature 0 is greedy. `LocalBackend` and `ServerBackend` take
requests in two ways, and a new backend needs these two methods. Evaluation and distillation read a stream:
`answers(requests)` takes an iterable and yields (place, Answer) as they finish. The judge of rmr1.py has many
callers at once: `submit(requests)` returns a Future of an Answer for each request, and never waits. A
`ScalarBackend` has neither, because it answers with numbers.
"""

import asyncio
import atexit
import base64
import functools
import itertools
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import unquote

from lib.chat import (
    THOUGHT_TAGS,
    THOUGHTS,
    PromptRefused,
    decode_sample,
    encode,
    prompt_fingerprint,
)
from lib.files import Failure, first_line, number
from lib.model_files import (
    check_are_floats,
    config_of,
    find_model,
    fingerprint,
    tensors_in_files,
    window_of,
)
from rubrics import PROTOCOLS, parse

# ---------------------------------------------------------------- flags

BACKEND_FLAGS = {
    "model": dict(
        required=True,
        help="a judge's folder or hub id, FOLDER/config.json for random weights, or "
        "a server's name for it",
    ),
    "protocol": dict(
        choices=PROTOCOLS, help="prompt style; default: the model's own (its judge.json)"
    ),
    "system-prompt": dict(
        help="file with the system prompt, instead of the model's, the row's or ours"
    ),
    "base-url": dict(help="ask an OpenAI-compatible server; its key comes from OPENAI_API_KEY"),
    "at-once": dict(type=number(int, 1), default=64, help="requests under way at a server"),
    "journal": dict(
        help="file that keeps every judgment: started again, nothing is asked for twice"
    ),
    "temperature": dict(
        type=number(float, 0), default=1.0, help="of the second vote in an order, and more"
    ),
    "seed": dict(type=number(int, 0), default=0, help="of whatever is drawn"),
    "max-tokens": dict(type=number(int, 1), default=8192, help="longest judgment in tokens"),
    "max-len": dict(
        type=number(int, 2), help="prompt and judgment together; default: the model's window"
    ),
    "dtype": dict(choices=("float32", "bfloat16"), default="bfloat16", help="of the computation"),
}


def backend_flags(parser, names, **defaults):
    """Add to a script's parser those of BACKEND_FLAGS that it has.

    names     of the flags, with spaces between them
    defaults  the script's own, which replace those above
    """
    for name in names.split():
        parser.add_argument(f"--{name}", **BACKEND_FLAGS[name])
    parser.set_defaults(**defaults)


def make_backend(
    model,
    base_url=None,
    max_tokens=8192,
    folder=None,
    at_once=64,
    key=None,
    patience=60,
    max_len=None,
    dtype="bfloat16",
    memory=0.9,
    seed=0,
    tp=1,
    flag="--base-url",
):
    """The backend of a model: a `ServerBackend` where there is a URL, else a `LocalBackend`.

    folder, at_once, key, patience, flag  settings of a server, see `ServerBackend`
    max_len, dtype, memory, seed, tp   settings of a local model, see `LocalBackend`

    Scripts give the settings of both. Those of the other kind mean nothing and are ignored.
    """
    if base_url:
        return ServerBackend(base_url, model, max_tokens, at_once, key, patience, folder, flag)
    return LocalBackend(str(model), max_tokens, max_len, dtype, memory, seed, tp)


# ---------------------------------------------------------------- answers


@dataclass
class Answer:
    """What came back for one request.

    text           "" where there is none
    finish         "stop"; "truncated" at the length limit; else a sentence that says why the text is no judgment
    tokens         tokens of the text
    prompt_tokens  tokens of the prompt
    failed         is there no answer, so that the request is worth making again?
    origin         "new"; "cached": from a journal; "shared": another caller's request in flight, whose tokens
                   are billed there
    """

    text: str
    finish: str
    tokens: int = 0
    prompt_tokens: int = 0
    failed: bool = False
    origin: str = "new"


def answer_from_sample(tokenizer, ids, sample):
    """The `Answer` that is an engine's sample for a prompt of token ids."""
    text = decode_sample(tokenizer, ids, sample.tokens)
    finish = "stop" if sample.finished else "truncated"
    return Answer(text, finish, len(sample.tokens), len(ids))


def read_answer(answer, single=False):
    """The `Judgment` in an `Answer`. Its reason says why an answer that did not end by itself has no verdict.

    single  is it of one response?
    """
    judgment = parse(answer.text, answer.finish == "stop", single)
    if answer.finish != "stop":
        judgment.reason = answer.finish
    return judgment


def no_answer(why):
    """The `Answer` for a server that gave none."""
    return Answer("", f"{NO_ANSWER}: {why}", failed=True)


def ids_or_refusal(tokenizer, messages, window):
    """(token ids, None) of a prompt, or (None, Answer) for one that can have no judgment."""
    try:
        ids = encode(tokenizer, messages)
    except PromptRefused as refusal:
        return None, Answer("", str(refusal))
    refusal = no_room(len(ids), window) if window else None
    return (None, refusal) if refusal else (ids, None)


NO_ROOM = re.compile(r"prompt .* the window of \d+ tokens$")  # as the next function says it


def no_room(length, window):
    """The `Answer` to a prompt of `length` tokens that leaves no room in a window, or None if there is room."""
    if length < window:
        return None
    why = "longer than" if length > window else "leaves no room for a judgment in"
    return Answer("", f"prompt {why} the window of {window} tokens", prompt_tokens=length)


# ---------------------------------------------------------------- a model in this process


class LocalBackend:
    """A model in this process by vLLM, or one in every rank.

    model       a folder or hub id; FOLDER/config.json means random weights
    max_tokens  of a response
    max_len     of prompt and response together; default: the model's window
    dtype       "float32" or "bfloat16"
    memory      share of a card for the engine
    seed        of random weights
    tp          ranks that hold one engine together, see `Engine`

    Building one is a collective of all ranks.
    """

    def __init__(self, model, max_tokens, max_len=None, dtype="bfloat16", memory=0.9, seed=0, tp=1):
        from lib import chat, model_files, policy
        from lib import dist as ranks
        from lib.engine import Engine

        self.model = model
        self.folder = model_files.find_model(model)
        self.tokenizer, self.stop = chat.load_tokenizer(self.folder)
        window = model_files.window_of(model_files.config_of(self.folder))
        self.window = min(max_len or window, window)
        self.max_tokens = max_tokens

        random_weights = model.endswith("config.json")
        if not random_weights:
            model_files.check_weights(model, self.folder)
        *_, device = ranks.start_ranks()
        source = "dummy" if random_weights else "auto"
        self.engine = Engine(self.folder, self.window, dtype, source, memory, tp)
        if random_weights:  # the folder has none: bring them, as training does
            dtype = policy.DTYPES[dtype]
            network = policy.load_policy(model, device, dtype, seed, trainable=False)
            self.engine.sync(network, dtype)

        self.inbox = queue.SimpleQueue()  # of (ids, seed, temperature, future)
        self.worker = None

    def about(self):
        """What tells its answers from another model's."""
        return [fingerprint(self.model, self.folder), prompt_fingerprint(self.folder)]

    def answers(self, requests):
        """Answer an iterable of requests. Yields (place, Answer) as they finish."""
        # The engine numbers the prompts that it gets, and a prompt without room is not among them.
        indices = itertools.count()
        in_engine = {}  # {the engine's number of a prompt: (place in `requests`, ids)}
        refused = []

        def prompts():
            for place, (messages, seed, temperature) in enumerate(requests):
                ids, refusal = ids_or_refusal(self.tokenizer, messages, self.window)
                if refusal:
                    refused.append((place, refusal))
                    continue
                in_engine[next(indices)] = place, ids
                yield ids, seed, temperature

        samples = self.engine.stream(prompts(), self.max_tokens, self.stop, logprobs=False)
        for index, sample in samples:
            place, ids = in_engine.pop(index)
            yield place, answer_from_sample(self.tokenizer, ids, sample)
        yield from refused

    def submit(self, requests):
        """-> [Future of an Answer, ...]

        One thread steps the engine, and requests that come meanwhile join its next step. Not for tensor
        parallelism, whose ranks must hand in the same requests at the same step.
        """
        futures = []
        for messages, seed, temperature in requests:
            future = Future()
            futures.append(future)
            ids, refusal = ids_or_refusal(self.tokenizer, messages, self.window)
            if refusal:
                future.set_result(refusal)
            else:
                self.inbox.put((ids, seed, temperature, future))
        if self.worker is None:
            self.worker = threading.Thread(target=self.work, daemon=True)
            self.worker.start()
        return futures

    def work(self):
        """Let the engine answer what is in the inbox, for as long as the process lives."""
        in_engine = {}  # {the engine's number of a prompt: (ids, future)}

        def prompts():
            # `Engine.stream` asks this generator for more before each of its steps, and numbers what it yields.
            # While texts are being sampled it may not be kept waiting for the next request: an empty inbox then
            # yields None, "nothing more for now", after which the engine takes its step and asks again. A None
            # takes a number as a prompt does, so this count goes on with every yield. Where nothing is being
            # sampled, there is nothing to step, and the thread sleeps until a request comes.
            for index in itertools.count():
                try:
                    ids, seed, temperature, future = self.inbox.get(block=not in_engine)
                except queue.Empty:
                    yield None
                    continue
                in_engine[index] = ids, future
                yield ids, seed, temperature

        while True:
            try:
                samples = self.engine.stream(prompts(), self.max_tokens, self.stop, logprobs=False)
                for index, sample in samples:
                    ids, future = in_engine.pop(index)
                    future.set_result(answer_from_sample(self.tokenizer, ids, sample))
            except BaseException as e:  # nobody may wait for ever
                for _, future in in_engine.values():
                    future.set_exception(e)
                in_engine.clear()


# ---------------------------------------------------------------- a server

# A server's words for a prompt that its window has no room for, and for one that a filter has refused.
TOO_LONG = re.compile(
    r"(?i)context.?(length|size|window|shift)|"
    r"(prompt|input)\b.{0,40}(too long|too large|longer than|exceeds)"
)
FILTERED = re.compile(
    r"(?i)content.?(filter|management)|(content|usage|safety)(?!.security).{0,20}polic|moderation|flagged|"
    r"data.?inspection|inappropriate|(?<!case.)\b(new_)?sensitive\b|block.?reason|敏感"
)
# A server's words for an account that has nothing left: waiting does not help.
NO_MONEY = re.compile(
    r"(?i)insufficient.(user.)?(quota|balance|funds|credit)|credit balance|余额不足"
)
# Its words for a key or a model that it does not know, and for a limit that passes.
NO_KEY = re.compile(
    r"(?i)(invalid|incorrect|wrong|missing).{0,5}(api.?)?key|authenticat|unauthori[sz]ed"
)
NO_MODEL = re.compile(r"(?i)model.?not.?(found|exist)|model\b.{0,60}does.?not.?exist|no such model")
BUSY = re.compile(r"(?i)rate.?limit|too.?many.?requests|overloaded|quota")
OF_REQUEST = re.compile(r"(?i)invalid.?(request|param|argument|prompt|input)|bad.?request")
# MiniMax says these with status 200: refused for what is in it, its length, its settings.
MINIMAX_STATUS = {1004: 401, 1008: 402, 1026: 400, 1027: 400, 1039: 400, 2013: 400, 2049: 401}
REFUSED_BY_SERVER = "refused by the server"
NO_ANSWER = "no answer from the server"

OF_KEY_OR_MODEL = (401, 402, 404)  # no request will be answered: a wrong key or model, no money
TRY_AGAIN = (408, 409, 425, 429)  # of the 4xx, those that pass by themselves: a limit, a conflict
FIRST_WAIT, LONGEST_WAIT = 0.5, 8  # seconds before a request is made again, doubled each time
# Seconds without a byte, and of a whole request. While it lets a request wait, a server may send blanks for ever.
LONGEST_SILENCE, LONGEST_REQUEST = 600, 3600
MOST_BYTES = 64 << 20  # of a response; a completion of a million tokens has less

# The full softmax. A setting that is not sent is the server's own, or of the model's generation_config.json.
FULL_SOFTMAX = {
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
# What a server can lack: OpenAI has no top_k, Mistral no seed.
OPTIONAL_SETTINGS = ("seed", *FULL_SOFTMAX)
HARMLESS_PROMPT = [{"role": "user", "content": "Answer with the letter A."}]


class Refused(Failure):
    """A server that would refuse whatever is asked: a wrong key, an unknown model, a setting that it lacks."""


@dataclass(frozen=True)
class SamplingSettings:
    """What prompts of token ids must share to travel in one request. limit: tokens of a response."""

    temperature: float
    seed: int
    limit: int


class ServerBackend:
    """A model behind an OpenAI-compatible endpoint.

    base_url    see `read_url`; name and password may stand before its host
    model       the server's name for the model; default: the first that it lists
    max_tokens  of a response
    at_once     requests that are under way together
    key         default: OPENAI_API_KEY; a server of one's own needs none
    patience    seconds for which a request is made again, after longer and longer waits, while the server has
                limits or errors, or restarts
    folder      the model's folder, if it is at hand. Then token ids go to /completions, where a response cannot
                spell a control token and a seed gives the text of `LocalBackend`; else chats go to
                /chat/completions
    flag        of the script that has the URL, for messages

    `status_action` and `answer_from_chat` say what becomes of what a server says. Raises Refused where nobody
    answers, or where no request would be answered. Messages of a server are passed on without key and
    password, which some servers repeat.
    """

    def __init__(
        self,
        base_url,
        model=None,
        max_tokens=8192,
        at_once=64,
        key=None,
        patience=60,
        folder=None,
        flag="--base-url",
    ):
        self.url, self.query = read_url(base_url, flag)
        self.flag = flag
        self.model = model
        self.max_tokens = max_tokens
        self.limit_field = "max_tokens"
        self.at_once = at_once
        self.patience = patience
        # The loop's thread alone uses these.
        self.lacking = set()  # the OPTIONAL_SETTINGS that the server refuses
        self.answered = set()  # temperatures at which the server has answered a chat

        self.folder = None
        if folder:
            from lib import chat, model_files

            self.folder = model_files.find_model(folder)
            self.tokenizer, self.stop = chat.load_tokenizer(self.folder)
            self.vocabulary = model_files.config_of(self.folder).vocab_size
        self.log_in(base_url, key or os.environ.get("OPENAI_API_KEY"))

        # Connections belong to an event loop, while callers come from any loop or thread. So the server has a
        # loop of its own, in a thread of its own.
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.run_in_loop(self.open()).result()
        atexit.register(self.close)

    def log_in(self, base_url, key):
        """Set the header for a key or the URL's name and password, and the secrets in it."""
        login = login_of(base_url)
        user, _, password = login.partition(":")
        self.headers = {"Authorization": f"Bearer {key or 'none'}"}
        basic = ""
        if user:
            basic = base64.b64encode(unquote(f"{user}:{password}").encode()).decode()
            self.headers = {"Authorization": f"Basic {basic}"}
        secret = password or user
        in_query = [value for value in re.findall(r"=([^&]*)", self.query) if len(value) > 5]
        secrets = [basic, key, secret, *in_query]
        secrets += [unquote(text) for text in secrets if text]
        self.secrets = sorted(filter(None, secrets), key=len, reverse=True)

    def about(self):
        """What tells its answers from another model's.

        Settings that the server turns out to lack are no part of it: they are found out while it is asked, and a
        judgment's key in the journal is needed before. Should it accept one later, old answers are still used.
        """
        if self.folder is None:
            return [self.url, self.model]
        return [fingerprint(self.folder, self.folder), prompt_fingerprint(self.folder)]

    def run_in_loop(self, coroutine):
        """Start a coroutine in the server's loop, from any thread. -> Future"""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self):
        self.run_in_loop(self.session.close()).result(5)

    async def open(self):
        """Connect. Where nobody answers, it is found out at once and not after every request's last try."""
        import aiohttp

        self.aiohttp = aiohttp
        self.slots = asyncio.Semaphore(self.at_once)
        self.probing = asyncio.Lock()
        self.window = None
        self.session = aiohttp.ClientSession(
            headers=self.headers,
            trust_env=True,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=LONGEST_REQUEST, sock_connect=10, sock_read=LONGEST_SILENCE
            ),
        )
        models = None
        nobody = (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError, aiohttp.InvalidURL)
        unlike = (TimeoutError, aiohttp.ClientError, ValueError)
        try:
            timeout = aiohttp.ClientTimeout(10)
            url = self.route_url("/models")
            async with self.session.get(url, timeout=timeout, allow_redirects=False) as response:
                self.check_redirect(response)
                models = field_of(json.loads(await response.read()), "data")
        except nobody as e:
            await self.session.close()
            why = self.without_secrets(e)
            raise Refused(f"{self.flag} {self.url}: nobody answers there ({why})") from e
        except unlike:
            pass  # somebody answers, though not in the way of such a server
        except Refused:
            await self.session.close()
            raise

        for model in models if isinstance(models, list) else []:
            self.model = self.model or field_of(model, "id")
            if self.model and field_of(model, "id") == self.model:
                window = field_of(model, "max_model_len")
                self.window = window if isinstance(window, int) else None
        if self.model is None:
            await self.session.close()
            raise Refused(
                f"{self.flag} {self.url}: lists no models; name one, if the URL is right{self.url_hint()}"
            )

    def route_url(self, route):
        """The address of a route, such as "/models"."""
        return f"{self.url}{route}{self.query}"

    def url_hint(self):
        """What may be wrong with a URL that leads to no such server; "" where it looks right."""
        return "" if re.search(r"/v\d\w*$", self.url) else " (the URL of such a server ends in /v1)"

    def check_redirect(self, response):
        """Raises Refused where the server is somewhere else: as a redirected request, a POST becomes a GET."""
        if 300 <= response.status < 400:
            place = without_user(response.headers.get("Location", ""))
            raise Refused(
                f"{self.flag} {self.url}: leads to another address ({self.without_secrets(place)}); "
                "give the one that it should be"
            )

    def answers(self, requests):
        """Answer an iterable of requests. Yields (place, Answer) as they finish."""
        numbered_requests = enumerate(requests)
        done = queue.SimpleQueue()
        under_way = 0
        while True:
            for place, request in itertools.islice(numbered_requests, self.at_once - under_way):
                (future,) = self.submit([request])
                future.add_done_callback(lambda future, place=place: done.put((place, future)))
                under_way += 1
            if not under_way:
                return
            place, future = done.get()
            under_way -= 1
            yield place, future.result()

    def submit(self, requests):
        """-> [Future of an Answer, ...]"""
        futures = [Future() for _ in requests]
        if self.folder:
            self.submit_ids(requests, futures)
        else:
            for (messages, seed, temperature), future in zip(requests, futures):
                seed = (
                    seed % 2**31 if temperature else 0
                )  # as OpenAI wants it; greedy has no use for one
                settings = {"temperature": temperature, "seed": seed}
                self.run_in_loop(self.resolve(self.by_chat(messages, settings), [future]))
        return futures

    def submit_ids(self, requests, futures):
        """Hand in requests as token ids. Those of the same settings travel together, as the greedy ones of a
        round do, which saves a small model half of its time."""
        groups = defaultdict(list)  # {settings: [(prompt, future), ...]}
        for (messages, seed, temperature), future in zip(requests, futures):
            prompt, refusal = ids_or_refusal(self.tokenizer, messages, self.window)
            if refusal:
                future.set_result(refusal)
                continue
            limit = self.max_tokens
            if self.window:
                limit = min(limit, self.window - len(prompt))
            if temperature == 0:
                seed = 0  # greedy has no use for it
            groups[SamplingSettings(temperature, seed, limit)].append((prompt, future))
        for settings, group in groups.items():
            prompts = [prompt for prompt, _ in group]
            waiting = [future for _, future in group]
            self.run_in_loop(self.resolve(self.by_ids(prompts, settings), waiting))

    async def resolve(self, request, futures):
        """Make a request, a coroutine that returns answers, and let these be the futures' results."""
        try:
            async with self.slots:
                answers = await request
            for future, answer in zip(futures, answers, strict=True):
                future.set_result(answer)
        except BaseException as e:  # is raised where the answers are awaited
            for future in futures:
                future.set_exception(e)

    async def by_ids(self, prompts, settings):
        """Answers to prompts of token ids. -> [Answer, ...]"""

        body = {
            "prompt": [prompt.tolist() for prompt in prompts],
            "max_tokens": settings.limit,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "return_token_ids": True,
            "stop_token_ids": self.stop,
            "skip_special_tokens": False,
            **FULL_SOFTMAX,
        }
        read = functools.partial(answers_from_ids, self.tokenizer, self.vocabulary, prompts)
        answers = await self.post("/completions", body, read)
        refusal = refusal_in(answers)
        if refusal and len(prompts) > 1:  # it may be of one of them
            return [(await self.by_ids([prompt], settings))[0] for prompt in prompts]
        if refusal:
            harmless = encode(self.tokenizer, HARMLESS_PROMPT)
            is_harmless = prompts[0].tolist() == harmless.tolist()
            probe = None if is_harmless else functools.partial(self.by_ids, [harmless], settings)
            answers[0].failed = not await self.is_of_prompt(refusal, settings.temperature, probe)
        elif not answers[0].failed:
            self.answered.add(settings.temperature)
        return answers if len(answers) == len(prompts) else answers * len(prompts)

    async def by_chat(self, messages, settings):
        """The answer to a chat. -> [Answer]

        A refusal may be of one setting that the server lacks; the chat is then sent without it. Otherwise it is
        final if it is of this prompt. Raises Refused where it is of any prompt.
        """
        wanted = {name: value for name, value in FULL_SOFTMAX.items() if name not in self.lacking}
        wanted |= {name: value for name, value in settings.items() if name not in self.lacking}
        body = {"messages": messages, self.limit_field: self.max_tokens} | wanted
        while True:
            answers = await self.post("/chat/completions", body, answers_from_chat)
            refusal = refusal_in(answers)
            smaller = body_without_refused(body, refusal)
            if smaller is None:
                break
            body = smaller

        if refusal:
            is_harmless = messages == HARMLESS_PROMPT
            probe = (
                None if is_harmless else functools.partial(self.by_chat, HARMLESS_PROMPT, settings)
            )
            answers[0].failed = not await self.is_of_prompt(refusal, settings["temperature"], probe)
        elif not answers[0].failed:
            self.keep_settings(body, wanted)
            self.answered.add(settings["temperature"])
        return answers

    def keep_settings(self, body, wanted):
        """Remember what the server had to be asked without, and say so once."""
        if "max_completion_tokens" in body:
            self.limit_field = "max_completion_tokens"
        for name in wanted:
            if name not in body and name not in self.lacking:
                self.lacking.add(name)
                print(f"{self.url} does not take {name}: its own is used", file=sys.stderr)

    async def is_of_prompt(self, refusal, temperature, probe):
        """Whether it is the prompt that the server refuses, and would again.

        probe  asks for something harmless with the same settings; None if that was refused

        If the refusal's words do not name the prompt, and nothing has been answered yet, a harmless prompt is sent
        with the same settings. If that is refused as well, the server refuses everything: raises Refused, since
        thousands of requests would end as this one did. False where the server gives no answer.
        """
        if names_the_prompt(refusal):
            return True
        if probe is None:
            raise self.refuses_all(refusal)
        async with self.probing:  # one of them asks, and the others wait for what it learns
            if temperature not in self.answered:
                await probe()
        return temperature in self.answered

    def refuses_all(self, why):
        """The error for a server that would refuse whatever is asked."""
        advice = f"the key is read from OPENAI_API_KEY, the model is {self.model}"
        if is_word("temperature", why):
            advice = "eval.py takes --temperature 1, and rmr1.Judge greedy=False, for a model that cannot be greedy"
        return Refused(f"{self.url}: {why} ({advice}){self.url_hint()}")

    async def post(self, route, body, read):
        """Answers to a request. -> [Answer, ...], one alone where there is no completion

        read  takes what is in the server's JSON, gives [Answer, ...]

        The request is made again while that can help and patience lasts. Raises Refused for what stays so for
        all requests: a wrong key or model.
        """
        body = {"model": self.model} | body
        own_wait = FIRST_WAIT
        end = time.monotonic() + self.patience
        while True:
            answers, action, least_wait = await self.post_once(route, body, read)
            if action == "end":
                raise self.refuses_all(answers[0].finish)
            wait = max(least_wait, own_wait * random.uniform(0.5, 1))  # not all of them at once
            if action == "take" or time.monotonic() + wait > end:
                return answers
            await asyncio.sleep(wait)
            own_wait = min(2 * own_wait, LONGEST_WAIT)

    async def post_once(self, route, body, read):
        """-> [Answer, ...], what to do (as `status_action` says, or "take"), seconds to wait at least"""
        network_errors = (TimeoutError, self.aiohttp.ClientError, OSError)
        url = self.route_url(route)
        try:
            async with self.session.post(url, json=body, allow_redirects=False) as response:
                self.check_redirect(response)
                text = await body_text(response)
                least_wait = seconds_of(response.headers.get("Retry-After", ""))
                status = response.status
        except network_errors as e:
            return [no_answer(self.without_secrets(e) or type(e).__name__)], "again", 0

        if 200 <= status < 300:
            try:
                completion = json.loads(text)
            except (ValueError, RecursionError):
                return [no_answer(f"not JSON: {self.without_secrets(text)}")], "again", least_wait
            status = status_inside(completion)
            if status == 200:
                answers = read(completion)
                failed = any(answer.failed for answer in answers)
                return answers, "again" if failed else "take", least_wait

        action = status_action(status, text)
        why = f"{status}: {self.without_secrets(text)}"
        if action == "refuse":
            return [Answer("", f"{REFUSED_BY_SERVER}: {why}", failed=True)], "take", 0
        return [no_answer(why)], action, least_wait

    def without_secrets(self, message):
        """A server's message as it may be displayed."""
        text = str(message)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text[:300]


# ---------------------------------------------------------------- a server's address

# What can stand between a URL's beginning and its host: name and password.
URL_LOGIN = re.compile(r"^(\w+://)?([^/?#]*)@")


def read_url(text, flag="--base-url"):
    """A server's base URL, without name and password, and its query. -> "http://host/v1", "?name=value" or ""

    A slash at the end, or a route that is ours to add, is taken away. Raises Refused for what is no URL.
    """
    url, mark, query = without_spaces(text).partition("?")
    url = without_user(url)
    if not re.match(r"(?i)https?://", url):
        raise Refused(f"{flag} {url}: nobody answers there; a URL begins with http:// or https://")
    url = url.partition("#")[0].rstrip("/")
    url = re.sub(r"/(chat/completions|completions|models)$", "", url).rstrip("/")
    return url, mark + query.partition("#")[0]


def without_spaces(url):
    """A URL without the spaces, line ends and quotes around it that a shell or a file leaves."""
    return url.strip().strip("\"'").strip()


def login_of(url):
    """NAME:PASSWORD of a URL, or ""."""
    found = URL_LOGIN.match(without_spaces(url))
    return found[2] if found else ""


def without_user(url):
    """A URL as it may be displayed and saved: without name and password, and without a query, which may have a
    key in it."""
    url = re.split(r"[?#]", without_spaces(url))[0]
    return URL_LOGIN.sub(lambda found: found[1] or "", url)


# ---------------------------------------------------------------- what a server says


def status_action(status, text):
    """What an HTTP status that is no success means for a request; docs/remote.md has the table.

    text  the body that came with it

    -> "again": it may pass; "refuse": it would be refused again, for its prompt or its settings; "end": so
    would all others
    """
    if status in OF_KEY_OR_MODEL or status == 429 and NO_MONEY.search(text):
        return "end"
    # Some give the status of a crash to a prompt that they cannot take. A page of HTML is of a proxy between.
    if status >= 500 and text.lstrip().startswith("{") and names_the_prompt(text):
        return "refuse"
    return "refuse" if 400 <= status < 500 and status not in TRY_AGAIN else "again"


def status_inside(completion):
    """The status that a response with HTTP status 200 should have had.

    Some servers report a failure as an error object in the body, whose number or words name the status. Others
    give no choices, and the reason beside them.
    """
    choices = field_of(completion, "choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    base = field_of(completion, "base_resp")  # MiniMax has it in every response
    has_failed = count_or_zero(field_of(base, "status_code")) > 0
    error = field_of(completion, "error") or field_of(choice, "error") or (has_failed and base)
    if not error and choice is not None:
        return 200
    names = ("code", "status", "status_code")
    codes = [count_or_zero(field_of(said, name)) for said in (error, completion) for name in names]
    code = next(filter(None, codes), 0)
    if 400 <= code < 600:
        return code
    if code in MINIMAX_STATUS:
        return MINIMAX_STATUS[code]
    status = status_in_words(json.dumps(error or completion, ensure_ascii=False))
    return status or (500 if error or code else 200)


def status_in_words(words):
    """The HTTP status that a server's words stand for; 0 where they tell none."""
    kinds = {
        400: (TOO_LONG, FILTERED),
        402: (NO_MONEY,),
        401: (NO_KEY,),
        404: (NO_MODEL,),
        429: (BUSY,),
        422: (OF_REQUEST,),
    }
    for status, patterns in kinds.items():
        if any(pattern.search(words) for pattern in patterns):
            return status
    return 0


async def body_text(response):
    """The text of a response. Raises OSError where it has more bytes than any completion."""
    parts = []
    size = 0
    async for part in response.content.iter_chunked(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise OSError(f"a response of more than {MOST_BYTES:,} bytes")
    return b"".join(parts).decode("utf-8-sig", errors="replace")


def seconds_of(retry_after):
    """The seconds of a Retry-After header, a number or a date; 0 where it says nothing.

    A server that says 0 would be asked hundreds of times a second, so our own wait is the least.
    """
    try:
        seconds = float(retry_after)
        return seconds if math.isfinite(seconds) else 0
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0


def refusal_in(answers):
    """The sentence with which a server has refused a request, or ""."""
    finish = answers[0].finish
    return finish if finish.startswith(REFUSED_BY_SERVER) else ""


def names_the_prompt(refusal):
    """Whether a refusal's words say that it is of this prompt."""
    return bool(TOO_LONG.search(refusal) or FILTERED.search(refusal))


def is_of_window(finish):
    """Whether an answer has no text because a window, ours or a server's, had no room for it."""
    is_refusal = finish.startswith(REFUSED_BY_SERVER)
    return NO_ROOM.match(finish) is not None or is_refusal and TOO_LONG.search(finish) is not None


def body_without_refused(body, refusal):
    """The body of a chat without what a refusal names, or None where there is nothing to leave out.

    A prompt that leaves less room than the limit is sent again without one, and gets what room there is.
    OpenAI's o-series wants the limit by another name.
    """
    limits = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
    if limits and TOO_LONG.search(refusal):
        return {name: value for name, value in body.items() if name not in limits}
    if "max_tokens" in body and "max_completion_tokens" in refusal:
        smaller = {name: value for name, value in body.items() if name != "max_tokens"}
        return smaller | {"max_completion_tokens": body["max_tokens"]}
    words = refusal.replace("_", "").lower()  # xAI names presencePenalty
    named = [name for name in OPTIONAL_SETTINGS if name in body and is_word(name, words)]
    if named:
        return {name: value for name, value in body.items() if name not in named}
    return None


def is_word(name, words):
    return re.search(rf"\b{name.replace('_', '')}\b", words) is not None


# ---------------------------------------------------------------- how a text has ended

# Servers' names for the end of a text, in lower case, as far as they are known.
BY_ITSELF = re.compile(
    r"|stop|stop_sequence|stop_token|eos|eos_token|end_turn|end_of_turn|endoftext|complete|completed|done|finished|"
    r"tool_calls?|tool_use|function_call"
)
BROKEN_OFF = re.compile(
    r"error|abort|cancel|time.?out|time.?limit|not.?finished|in.?progress|insufficient|fail|overload|rate.?limit|"
    r"interrupt|disconnect|shutdown|preempt|none|null|load"
)
BY_FILTER = re.compile(
    r"filter|refus|sensitive|safety|recitation|prohibited|blocklist|blocked|spii|toxic|guardrail|moderation"
)
CUT_OFF = re.compile(r"length|max|limit|incomplete|window|truncat")


def finish_of(reason):
    """What a server's finish reason says of its text, as `Answer.finish` has it; None where it broke off.

    A word that is not known does not make a text whole: its verdict may stand before something else.
    """
    if reason is None:
        return None
    reason = str(field_of(reason, "type") or reason)  # SGLang's own route has an object
    word = re.sub(r"^(finish_?)?reason[._:]", "", reason.strip().lower())
    if BY_ITSELF.fullmatch(word):
        return "stop"
    if BY_FILTER.search(word):
        return "stopped by a content filter"
    if BROKEN_OFF.search(word):
        return None
    if CUT_OFF.search(word):
        return "truncated"
    return f"the text ends in {reason[:60]!r}, which is no known end"


# ---------------------------------------------------------------- what is in a completion


def answers_from_chat(response):
    return [answer_from_chat(response)]


def answer_from_chat(response):
    """A chat completion as an `Answer`; docs/remote.md has the table.

    Every completion is final: asked again, the model would say the same. A body that is no completion is worth
    asking again, and so is an empty message that cost no tokens, which a server gives while it starts.
    """
    choices = field_of(response, "choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return no_answer("not a chat completion")
    message = field_of(choice, "message")
    usage = field_of(response, "usage")
    tokens = count_or_zero(field_of(usage, "completion_tokens"))
    prompt_tokens = count_or_zero(field_of(usage, "prompt_tokens"))
    text, thoughts, refusal = texts_of(message)
    has_call = field_of(message, "tool_calls") or field_of(message, "function_call")

    reason = choice.get(
        "finish_reason", ""
    )  # null: not finished; a server that lacks the field says nothing
    finish = finish_of(reason)
    if finish is None:
        return broken_off(reason)
    if finish == "stop" and not text.strip():
        if refusal:
            finish = f"refused by the model: {refusal[:300]}"
        elif has_call:
            finish = "a tool call instead of a text"
        elif thoughts:
            finish = "thoughts alone, without a text"
        elif tokens:
            finish = "an empty text"
        else:
            return no_answer("an empty message")
    return Answer(judgment_text(text, thoughts), finish, tokens, prompt_tokens)


def broken_off(reason):
    """The `Answer` to a completion that ended before its text did."""
    return no_answer(f"the completion ends in {str(reason or 'no finish reason')[:60]}")


def answers_from_ids(tokenizer, vocabulary, prompts, response):
    """The `Answer`s in a completion of prompts of token ids. vocabulary: the number of ids that there are"""
    try:
        choices = {choice["index"]: choice for choice in response["choices"]}
        if len(choices) != len(response["choices"]):
            raise ValueError("two choices with one index")
        return [
            answer_from_ids(tokenizer, vocabulary, ids, choices[place])
            for place, ids in enumerate(prompts)
        ]
    except (LookupError, TypeError, ValueError):
        return [no_answer("not a completion with token ids, as vLLM gives them")]


def answer_from_ids(tokenizer, vocabulary, ids, choice):
    """The `Answer` in the choice of one prompt. Raises LookupError, TypeError or ValueError for what is none."""
    from lib.engine import Sample

    finish = finish_of(choice["finish_reason"])
    if finish is None:
        return broken_off(choice["finish_reason"])
    tokens = choice["token_ids"]
    if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        raise ValueError("an id that is none of the vocabulary")
    if finish == "stop" and not tokens:
        return no_answer("an empty message")
    answer = answer_from_sample(tokenizer, ids, Sample(tokens, [], finish == "stop"))
    answer.finish = finish
    return answer


def texts_of(message):
    """The text, the thoughts and the refusal in a message, "" for each that it lacks.

    Servers hand the thoughts over beside the text, under several names, or as parts of it.
    """
    content = field_of(message, "content")
    content = content if isinstance(content, list) else [content]
    refusal = joined_text(field_of(message, "refusal"))
    text = thoughts = ""
    for part in content:
        kind = str(field_of(part, "type") or "text")
        if kind in ("thinking", "reasoning"):
            thoughts += joined_text(part)
        elif kind == "refusal":
            refusal += joined_text(part)
        elif kind in ("text", "output_text"):
            text += joined_text(part)
    for name in ("reasoning_content", "reasoning", "thinking", "reasoning_details"):
        thoughts = thoughts or joined_text(field_of(message, name))
    return text, thoughts, refusal


def joined_text(value):
    """All text in a part of a message, which may be a text, a list of parts, or an object with either in it."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()  # half a surrogate pair could not be printed
    if isinstance(value, list):
        return "".join(map(joined_text, value))
    names = ("text", "thinking", "reasoning", "summary", "refusal", "content")
    return next((joined_text(value[name]) for name in names if field_of(value, name)), "")


def judgment_text(text, thoughts):
    """Thoughts and text as the model wrote them, which the parser reads. Without a text the thoughts may be cut
    off: they stay open.

    A tag within the thoughts, "I should close with </think>", would end them: it gets a space. Some servers leave
    the thoughts in the text too, which then has all.
    """
    if not thoughts or text.lstrip().startswith(tuple(THOUGHTS)):
        return text
    tags = "|".join(map(re.escape, THOUGHT_TAGS))
    thoughts = re.sub(tags, lambda tag: f"{tag[0][0]} {tag[0][1:]}", thoughts)
    opened = f"<think>\n{thoughts}"
    return f"{opened}\n</think>\n{text}" if text.strip() else opened


def field_of(value, name):
    """A field of a JSON object; None where it has none, or is no object."""
    return value.get(name) if isinstance(value, dict) else None


def count_or_zero(value):
    """A number of tokens, which servers also write as 20.0 or "20"; 0 where there is none."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError, OverflowError):  # nothing, a word, infinity
        return 0


# ---------------------------------------------------------------- a reward model that gives a number


class ScalarBackend:
    """A reward model that gives a number: a sequence classifier of `transformers` with one output.

    model         a folder or hub id
    batch_tokens  of a padded batch, padding included

    A conversation's score is the head's output at its last token.
    """

    def __init__(self, model, dtype="bfloat16", batch_tokens=16384):
        import torch
        from transformers import AutoTokenizer

        self.torch = torch
        self.name = model
        self.batch_tokens = batch_tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = find_model(model)
        self.window = window_of(config_of(folder))
        self.model = load_classifier(model, folder, getattr(torch, dtype)).to(self.device).eval()
        self.vocabulary = self.model.get_input_embeddings().num_embeddings
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # its files can be broken in as many ways as they have parsers
            raise Failure(
                f"--model {model}: no usable tokenizer in it ({first_line(error)})"
            ) from error
        if self.tokenizer.chat_template is None:
            raise Failure(f"--model {model}: its tokenizer has no chat template")

    def scores(self, conversations):
        """Reward of each conversation, which are messages with the response last.

        Yields (place, score), long ones first, in padded batches of similar length. The score is None where
        a conversation is longer than the model's window.
        """
        ids = [self.token_ids(messages) for messages in conversations]
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        while order:
            longest = len(ids[order[0]])
            if longest > self.window:
                yield order.pop(0), None
                continue
            rows = max(1, self.batch_tokens // longest)
            batch, order = order[:rows], order[rows:]
            yield from zip(batch, self.score_batch([ids[place] for place in batch], longest))

    def token_ids(self, messages):
        """The token ids of a conversation. Raises Failure where its template refuses it."""
        ids = encode(self.tokenizer, messages, generation_prompt=False).tolist()
        if max(ids) >= self.vocabulary:
            raise Failure(
                f"--model {self.name}: its tokenizer has the token {max(ids)}, its embedding only "
                f"{self.vocabulary} rows"
            )
        return ids

    def score_batch(self, rows, length):
        """Scores of rows of token ids, padded to a length. -> [float, ...]"""
        # transformers scores the last token that is not the pad token, and many a model's pad token is the one
        # that ends its turns. So the batch is padded with an id that none of its rows ends in.
        ends = {row[-1] for row in rows}
        pad = next(token for token in itertools.count() if token not in ends)
        self.model.config.pad_token_id = pad
        tokens = [row + [pad] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        tokens = self.torch.tensor(tokens, device=self.device)  # (B, T)
        mask = self.torch.tensor(mask, device=self.device)  # (B, T)
        with self.torch.no_grad():
            logits = self.model(input_ids=tokens, attention_mask=mask).logits  # (B, 1)
        scores = logits[:, 0].float()  # (B,)
        if not scores.isfinite().all():
            raise Failure(f"--model {self.name}: a score is not a number; try --dtype float32")
        return scores.tolist()


def load_classifier(model, folder, dtype):
    """The network of a reward model. Raises Failure unless the folder holds all of it, and nothing else.

    model  its name, for messages
    """
    from transformers import AutoModelForSequenceClassification

    config = config_of(folder)
    if config.num_labels != 1:
        raise Failure(
            f"--model {model}: a classifier with {config.num_labels} outputs; a reward model has one"
        )
    own_code = getattr(config, "auto_map", None) or {}
    if "AutoModelForSequenceClassification" in own_code:
        raise Failure(
            f"--model {model}: its score is computed by Python code that comes with it (auto_map in "
            "config.json), and such code is never run"
        )
    stored = tensors_in_files(folder, model)
    try:
        network, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a family without classifiers, or files that fit it in part
        raise Failure(
            f"--model {model}: cannot be loaded as a classifier ({first_line(error)})"
        ) from error

    # transformers draws missing tensors at random, and leaves out others; it only warns.
    missing = sorted(info["missing_keys"])
    others = sorted(set(info["unexpected_keys"]) - {"lm_head.weight"})
    if missing:
        advice = f"; others are there, such as {others[0]}" if others else ""
        raise Failure(
            f"--model {model}: the weights lack {len(missing)} tensors, the first is {missing[0]}{advice}"
        )
    if others:
        raise Failure(
            f"--model {model}: the weights have {len(others)} tensors that its config.json has no place for, "
            f"the first is {others[0]}"
        )
    if not getattr(config, "quantization_config", None):
        check_are_floats(
            model, {name: stored[name] for name in network.state_dict() if name in stored}
        )
    return network
