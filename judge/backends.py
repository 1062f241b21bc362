"""
Who answers a request: a model in this process, a server, or a reward model that gives a number; and their flags.

A request is (messages, seed, temperature), where temperature 0 is greedy. `LocalBackend` and `ServerBackend` take
requests in two ways, and another backend is a class that does too. Evaluation and distillation read a stream: `answers(requests)` takes an iterable and yields
(place, Answer) as they finish. The judge of rmr1.py has many callers at once: `submit(requests)` returns a Future
of an Answer for each request, and never waits.
"""

import asyncio
import atexit
import base64
import itertools
import json
import os
import queue
import random
import re
import threading
import time
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import unquote

from lib.chat import decode_sample, encode, without_control_tokens
from lib.files import Failure, number
from lib.model_files import fingerprint
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
):
    """The backend of a model: a `ServerBackend` where there is a URL, else a `LocalBackend`.

    folder, at_once, key, patience     settings of a server, see `ServerBackend`
    max_len, dtype, memory, seed, tp   settings of a local model, see `LocalBackend`

    Scripts give the settings of both. Those of the other kind mean nothing and are ignored.
    """
    if base_url:
        return ServerBackend(base_url, model, max_tokens, at_once, key, patience, folder)
    return LocalBackend(str(model), max_tokens, max_len, dtype, memory, seed, tp)


# ---------------------------------------------------------------- answers


@dataclass
class Answer:
    """What came back for one request.

    text           "" where there is none
    finish         "stop"; "truncated" at the length limit; else a sentence that says why there is no text
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


def read_answer(answer):
    """The `Judgment` in an `Answer`. Where there is no text, its reason says why."""
    judgment = parse(answer.text, answer.finish == "stop")
    if answer.finish not in ("stop", "truncated"):
        judgment.reason = answer.finish
    return judgment


def no_answer(why):
    """The `Answer` for a server that gave none."""
    return Answer("", f"no answer from the server: {why}", failed=True)


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
        window = model_files.config_of(self.folder).max_position_embeddings
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
        return fingerprint(self.model, self.folder)

    def answers(self, requests):
        """Answer an iterable of requests. Yields (place, Answer) as they finish."""
        # The engine numbers the prompts that it gets, and a prompt without room is not among them.
        indices = itertools.count()
        in_engine = {}  # {the engine's number of a prompt: (place in `requests`, ids)}
        refused = []

        def prompts():
            for place, (messages, seed, temperature) in enumerate(requests):
                ids = encode(self.tokenizer, messages)
                refusal = no_room(len(ids), self.window)
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
            ids = encode(self.tokenizer, messages)
            refusal = no_room(len(ids), self.window)
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

# A server's words for a prompt that its window has no room for.
TOO_LONG = re.compile(
    r"(?i)context.?(length|size|window)|"
    r"(prompt|input)\b.{0,40}(too long|too large|longer than|exceeds)"
)
REFUSED_BY_SERVER = "refused by the server"
URL_LOGIN = re.compile(r"(?<=//)([^/]*)@")  # name and password, which can stand before a URL's host

NO_SUCH_JUDGE = (401, 403, 404)  # a wrong key or model: no request will be answered
TRY_AGAIN = (408, 409, 425, 429)  # of the 4xx, those that pass by themselves: a limit, a conflict
FIRST_WAIT, LONGEST_WAIT = 0.5, 8  # seconds before a request is made again, doubled each time


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

    base_url    name and password may stand before its host
    model       the server's name for the model; default: the first that it lists
    max_tokens  of a response
    at_once     requests that are under way together
    key         default: OPENAI_API_KEY; a server of one's own needs none
    patience    seconds for which a request is made again, after longer and longer waits, while the server has
                limits or errors, or restarts
    folder      the model's folder, if it is at hand. Then token ids go to /completions, where a response cannot
                spell a control token and a seed gives the text of `LocalBackend`; else chats go to
                /chat/completions

    Raises Refused where nobody answers. Messages of a server are passed on without key and password, which
    some servers repeat.
    """

    def __init__(
        self, base_url, model=None, max_tokens=8192, at_once=64, key=None, patience=60, folder=None
    ):
        self.url = without_user(base_url)
        self.model = model
        self.max_tokens = max_tokens
        self.limit_field = "max_tokens"
        self.at_once = at_once
        self.patience = patience
        self.first_prompts = {}  # three of them, and how each was refused; the loop's thread alone uses it

        self.folder = None
        if folder:
            from lib import chat, model_files

            self.folder = model_files.find_model(folder)
            self.tokenizer, self.stop = chat.load_tokenizer(self.folder)
        self.log_in(base_url, key or os.environ.get("OPENAI_API_KEY"))

        # Connections belong to an event loop, while callers come from any loop or thread. So the server has a
        # loop of its own, in a thread of its own.
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.run_in_loop(self.open()).result()
        atexit.register(self.close)

    def log_in(self, base_url, key):
        """Set the header for a key or the URL's name and password, and the secrets in it."""
        login = "".join(re.findall(URL_LOGIN, base_url))
        user, _, password = login.partition(":")
        self.headers = {"Authorization": f"Bearer {key or 'none'}"}
        basic = ""
        if user:
            basic = base64.b64encode(unquote(f"{user}:{password}").encode()).decode()
            self.headers = {"Authorization": f"Basic {basic}"}
        secret = password or user
        self.secrets = [text for text in (basic, key, secret, unquote(secret)) if text]

    def about(self):
        """What tells its answers from another model's."""
        return fingerprint(self.folder, self.folder) or [self.url, self.model]

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
        self.window = None
        self.session = aiohttp.ClientSession(
            headers=self.headers,
            trust_env=True,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600),
        )
        models = []
        nobody = (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError, aiohttp.InvalidURL)
        unlike = (TimeoutError, aiohttp.ClientError, ValueError, LookupError, TypeError)
        try:
            timeout = aiohttp.ClientTimeout(10)
            async with self.session.get(self.url + "/models", timeout=timeout) as response:
                models = json.loads(await response.read())["data"]
        except nobody as e:
            await self.session.close()
            why = self.without_secrets(e)
            raise Refused(f"--base-url {self.url}: nobody answers there ({why})") from e
        except unlike:
            pass  # somebody answers, though not in the way of such a server

        if not isinstance(models, list):
            return
        for model in models:
            self.model = self.model or model["id"]
            if model["id"] == self.model:
                self.window = model.get("max_model_len")

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
            prompt = encode(self.tokenizer, messages)
            limit = self.max_tokens
            if self.window:
                refusal = no_room(len(prompt), self.window)
                if refusal:
                    future.set_result(refusal)
                    continue
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
        from lib.engine import Sample

        body = {
            "prompt": [prompt.tolist() for prompt in prompts],
            "max_tokens": settings.limit,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "return_token_ids": True,
            "stop_token_ids": self.stop,
            "skip_special_tokens": False,
            # The full softmax. Otherwise the model's generation_config.json decides.
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
        }
        response = await self.post("/completions", body)
        if isinstance(response, Answer):
            return [response] * len(prompts)
        try:
            choices = sorted(response["choices"], key=lambda choice: choice["index"])
            answers = []
            for ids, choice in zip(prompts, choices, strict=True):
                sample = Sample(choice["token_ids"], [], choice["finish_reason"] != "length")
                answers.append(answer_from_sample(self.tokenizer, ids, sample))
            return answers
        except (LookupError, TypeError, ValueError):
            return [no_answer("not a completion with token ids, as vLLM gives them")] * len(prompts)

    async def by_chat(self, messages, settings, limited=True):
        """The answer to a chat. -> [Answer]

        A refusal is final where the prompt is longer than the window. A prompt that leaves less room than
        `max_tokens` is sent again without a limit, and gets what room there is.
        """
        prompt = json.dumps(messages)
        if len(self.first_prompts) < 3:
            self.first_prompts.setdefault(prompt, "")

        limit = {self.limit_field: self.max_tokens} if limited else {}
        response = await self.post("/chat/completions", {"messages": messages} | limit | settings)
        if not isinstance(response, Answer):
            return [answer_from_chat(response)]
        if not response.finish.startswith(REFUSED_BY_SERVER):
            return [response]

        too_long = bool(TOO_LONG.search(response.finish))
        if too_long and limited:
            return await self.by_chat(messages, settings, limited=False)
        # OpenAI's o-series wants the limit by another name.
        if "max_tokens" in limit and "max_completion_tokens" in response.finish:
            self.limit_field = "max_completion_tokens"
            return await self.by_chat(messages, settings)
        response.failed = not too_long
        if not too_long:
            self.check_first_prompts(prompt, response.finish)
        return [response]

    def check_first_prompts(self, prompt, refusal):
        """Raises Refused where the first three prompts were refused in the same words: then it is not the
        prompts, and thousands of requests would end as the first three did."""
        if prompt not in self.first_prompts:
            return
        self.first_prompts[prompt] = re.sub(r"\d+", "", refusal)
        refusals = self.first_prompts.values()
        if len(refusals) == 3 and len(set(refusals)) == 1:
            raise Refused(f"{self.url}: {refusal} (so were the first three prompts)")

    async def post(self, route, body):
        """The server's response to a request, or an `Answer` that says why there is none.

        Raises Refused for what stays so for all requests: a wrong key or model.
        """
        body = {"model": self.model} | body
        network_errors = (TimeoutError, self.aiohttp.ClientError, OSError)
        wait = FIRST_WAIT
        end = time.monotonic() + self.patience
        while True:
            status = 0
            try:
                async with self.session.post(self.url + route, json=body) as response:
                    if response.status == 200:
                        return json.loads(await response.read())
                    status = response.status
                    text = await response.text(errors="replace")
                    why = f"{status}: {self.without_secrets(text)}"
                    wait = wait_before_retry(response.headers, wait)
            except (ValueError, RecursionError):
                return no_answer("not JSON")
            except network_errors as e:
                why = self.without_secrets(e) or type(e).__name__

            if status in NO_SUCH_JUDGE:
                raise Refused(
                    f"{self.url}: {why} (the key is read from OPENAI_API_KEY, the model is "
                    f"{self.model})"
                )
            if 400 <= status < 500 and status not in TRY_AGAIN:
                return Answer("", f"{REFUSED_BY_SERVER}: {why}", failed=True)
            if time.monotonic() + wait > end:
                return no_answer(why)
            await asyncio.sleep(wait * random.uniform(0.5, 1))  # not all of them at once
            wait = min(2 * wait, LONGEST_WAIT)

    def without_secrets(self, message):
        """A server's message as it may be displayed."""
        text = str(message)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text[:300]


def without_user(url):
    """A URL as it may be displayed and saved."""
    return URL_LOGIN.sub("", url)


def wait_before_retry(headers, wait):
    """Seconds until a request is made again: those of the server's Retry-After, else `wait`.

    A server that says 0 would be asked hundreds of times a second. It gets our own wait, which grows.
    """
    seconds = headers.get("Retry-After", "")
    if seconds.isdecimal() and int(seconds) > 0:
        return int(seconds)
    return wait


def answer_from_chat(response):
    """A chat completion as an `Answer`. Status 200 promises nothing: a proxy's page, a number, or a message
    of other parts than text is no answer."""
    choices = field_of(response, "choices")
    if not isinstance(choices, list) or not choices or choices[0] is None:
        return no_answer("not a chat completion")
    message = field_of(choices[0], "message")
    usage = field_of(response, "usage")

    text = field_of(message, "content")
    if text is None:
        return no_answer("an empty message")
    if not isinstance(text, str):
        return no_answer("a message that is not a text")
    # Servers hand the thinking over beside the text. The parser reads both as the model wrote them.
    thinking = field_of(message, "reasoning_content") or field_of(message, "reasoning")
    if thinking and isinstance(thinking, str):
        text = f"<think>\n{thinking}\n</think>\n{text}"

    finish = "truncated" if field_of(choices[0], "finish_reason") == "length" else "stop"
    tokens = field_of(usage, "completion_tokens")
    prompt_tokens = field_of(usage, "prompt_tokens")
    return Answer(text, finish, count_or_zero(tokens), count_or_zero(prompt_tokens))


def field_of(value, name):
    """A field of a JSON object; None where it has none, or is no object."""
    return value.get(name) if isinstance(value, dict) else None


def count_or_zero(value):
    return value if isinstance(value, int) else 0


# ---------------------------------------------------------------- a reward model that gives a number


class ScalarBackend:
    """A reward model that gives a number: a sequence classifier of `transformers` with one output.

    batch_tokens  of a padded batch, padding included
    """

    def __init__(self, model, dtype="bfloat16", batch_tokens=16384):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.torch = torch
        self.batch_tokens = batch_tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True
        )
        self.model = network.to(self.device).eval()

        config = self.model.config
        if config.num_labels != 1:
            raise Failure(
                f"--model {model}: a classifier with {config.num_labels} outputs; a reward model has one"
            )
        if self.tokenizer.chat_template is None:
            raise Failure(f"--model {model}: its tokenizer has no chat template")
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id

    def scores(self, conversations):
        """Reward of each conversation, which are messages with the response last.

        Yields (place, score), long ones first, in padded batches of similar length. The score is None where
        a conversation is longer than the model's window.
        """
        ids = []
        for messages in conversations:
            messages = without_control_tokens(self.tokenizer, messages)
            ids.append(
                self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            )
        window = self.model.config.max_position_embeddings
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        while order:
            longest = len(ids[order[0]])
            if longest > window:
                yield order.pop(0), None
                continue
            rows = max(1, self.batch_tokens // longest)
            batch, order = order[:rows], order[rows:]
            yield from zip(batch, self.score_batch([ids[place] for place in batch], longest))

    def score_batch(self, rows, length):
        """Scores of rows of token ids, padded to a length. -> [float, ...]"""
        pad = self.model.config.pad_token_id
        tokens = [row + [pad] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        tokens = self.torch.tensor(tokens, device=self.device)  # (B, T)
        mask = self.torch.tensor(mask, device=self.device)  # (B, T)
        with self.torch.no_grad():
            logits = self.model(input_ids=tokens, attention_mask=mask).logits  # (B, 1)
        return logits[:, 0].float().tolist()
