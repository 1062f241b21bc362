"""
Who answers: a model in this process, a server, a model that gives a number; their flags, and their journal.

`Local` and `Server` answer (messages, seed, temperature), 0 being greedy. Evaluation and distillation read a
stream: `answers(requests)`, an iterable in and (place, Answer) out. The judge of rmr1.py and the gateway of
serve.py, which many ask at once, hand in what they have and wait: `submit(requests)`, a `Future` for each.
"""
import asyncio
import atexit
import base64
import functools
import itertools
import json
import os
import queue
import random
import re
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import unquote

from engine import Engine, Sample, text_of
from files import fail, fingerprint, number, read_lines, write_lines
from rubrics import PROTOCOLS, encode, parse, plain

FLAGS = {
    "model": dict(required=True, help="a judge's folder or hub id, FOLDER/config.json for random weights, or "
                                      "a server's name for it"),
    "protocol": dict(choices=PROTOCOLS, help="prompt form; default: the model's own (its judge.json)"),
    "system-prompt": dict(help="file with the system prompt, instead of the model's, the row's or ours"),
    "base-url": dict(help="ask an OpenAI-compatible server; its key comes from OPENAI_API_KEY"),
    "at-once": dict(type=number(int, 1), default=64, help="requests under way at a server"),
    "journal": dict(help="file that keeps every judgment: started again, nothing is judged twice"),
    "temperature": dict(type=number(float, 0), default=1.0, help="of the second vote in an order, and more"),
    "seed": dict(type=number(int, 0), default=0, help="of whatever is drawn"),
    "max-tokens": dict(type=number(int, 1), default=8192, help="longest judgment in tokens"),
    "max-len": dict(type=number(int, 2), help="prompt and judgment together; default: the model's window"),
    "dtype": dict(choices=("float32", "bfloat16"), default="bfloat16", help="of the computation")}


def flags(ap, names, **defaults):
    """Those flags that say who answers and how it is asked which a script has, with defaults of its own."""
    for name in names.split():
        ap.add_argument(f"--{name}", **FLAGS[name])
    ap.set_defaults(**defaults)


def asker_of(model, base_url=None, max_tokens=8192, folder=None, at_once=64, key=None, patience=60, **local):
    """Who answers for a model: a `Server` where there is a URL, else a `Local`; each takes its settings."""
    if base_url:
        return Server(base_url, model, max_tokens, at_once, key, patience, folder)
    return Local(str(model), max_tokens, **local)


@dataclass
class Answer:
    """What came back for one chat. finish: "stop"; "cut off" at the length limit; else why there is no text.
    failed: worth asking again. origin: "new"; "cached", from a journal; "shared", asked for by another
    caller, who bears its tokens."""
    text: str
    finish: str
    tokens: int = 0
    prompt_tokens: int = 0
    failed: bool = False
    origin: str = "new"


def answer_to(tokenizer, ids, sample):
    """A `Sample` for a prompt as an `Answer`."""
    finish = "stop" if sample.finished else "cut off"
    return Answer(text_of(tokenizer, ids, sample), finish, len(sample.tokens), len(ids))


def judged(answer):
    """An `Answer` as a `Judgment`, whose reason is why there is no text where there is none."""
    judgment = parse(answer.text, answer.finish == "stop")
    if answer.finish not in ("stop", "cut off"):
        judgment.reason = answer.finish
    return judgment


def no_answer(why):
    return Answer("", f"no answer from the server: {why}", failed=True)


def no_room(n, window):
    """The `Answer` to a prompt of n tokens that leaves no room in a window, or None if there is some."""
    if n >= window:
        why = "longer than" if n > window else "leaves no room for a judgment in"
        return Answer("", f"prompt {why} the window of {window} tokens", prompt_tokens=n)


class Local:
    """A model in this process, or one in every rank, by vLLM. `model/config.json` means random weights."""

    def __init__(self, model, max_tokens, max_len=None, dtype="bfloat16", memory=0.9, seed=0, tp=1):
        import policy
        import ranks
        self.model, self.folder = model, policy.resolve(model)
        self.tokenizer, self.stop = policy.load_tokenizer(self.folder)
        window = policy.config_of(self.folder).max_position_embeddings
        self.window, self.max_tokens = min(max_len or window, window), max_tokens
        random = model.endswith("config.json")
        if not random:
            policy.check_weights(model, self.folder)
        *_, device = ranks.start_ranks()
        self.engine = Engine(self.folder, self.window, dtype, "dummy" if random else "auto", memory, tp)
        if random:                                 # the folder has no weights: bring them, as training does
            dtype = policy.DTYPES[dtype]
            self.engine.sync(policy.load(model, device, dtype, seed, trainable=False), dtype)
        self.inbox, self.worker = queue.SimpleQueue(), None

    def about(self):
        """What tells its answers from another model's."""
        return fingerprint(self.model, self.folder)

    def answers(self, requests):
        """requests: an iterable of (messages, seed, temperature). Yields (place, Answer) as they finish."""
        asked, refused = {}, []

        def prompts():
            for place, (messages, seed, temperature) in enumerate(requests):
                ids = encode(self.tokenizer, messages)
                if refusal := no_room(len(ids), self.window):
                    refused.append((place, refusal))
                else:
                    asked[len(asked)] = place, ids
                    yield ids, seed, temperature

        for at, s in self.engine.stream(prompts(), self.max_tokens, self.stop, logprobs=False):
            place, ids = asked[at]
            asked[at] = None
            yield place, answer_to(self.tokenizer, ids, s)
        yield from refused

    def submit(self, requests, heard=None):
        """-> [Future of an Answer, ...]. One thread steps the engine; what comes then joins its next step.
        Not for tensor parallelism, whose ranks must hand in the same requests at the same step."""
        futures = [Future() for _ in requests]
        for (messages, seed, temperature), future in zip(requests, futures):
            ids = encode(self.tokenizer, messages)
            if refusal := no_room(len(ids), self.window):
                future.set_result(refusal)
            else:
                self.inbox.put((ids, seed, temperature, future))
        if self.worker is None:
            self.worker = threading.Thread(target=self.work, daemon=True)
            self.worker.start()
        return futures

    def work(self):
        waiting = {}

        def prompts():
            for place in itertools.count():
                try:
                    ids, seed, temperature, future = self.inbox.get(block=not waiting)
                except queue.Empty:
                    yield None                     # nothing more for now
                    continue
                waiting[place] = future, ids
                yield ids, seed, temperature

        while True:
            try:
                for place, s in self.engine.stream(prompts(), self.max_tokens, self.stop, logprobs=False):
                    future, ids = waiting.pop(place)
                    future.set_result(answer_to(self.tokenizer, ids, s))
            except Exception as e:                 # nobody may wait for ever
                for future, _ in waiting.values():
                    future.set_exception(e)
                waiting.clear()


# A server's words for a prompt that its window has no room for.
TOO_LONG = re.compile(r"(?i)context.?(length|size|window)|"
                      r"(prompt|input)\b.{0,40}(too long|too large|longer than|exceeds)")
REFUSED = "refused by the server"
USER = re.compile(r"(?<=//)([^/]*)@")      # name and password, which can stand before a URL's host


class Refused(Exception):
    """A server that would refuse whatever it is asked: a wrong key, an unknown model, a setting it lacks."""


class Server:
    """A model behind an OpenAI-compatible endpoint. The key comes from OPENAI_API_KEY; a server of one's own
    needs none. `at_once` requests are under way together. Limits, failures and a server that restarts: what
    waited is asked again, later and later, for up to `patience` seconds. What a server says is passed on
    without key and password, which some repeat.

    model    the server's name for it; default: the first that it lists
    folder   the model's folder, if it is at hand. Then token ids go to /completions, where a response cannot
             spell a control token and a seed gives the text of `Local`; else chats to /chat/completions
    """

    def __init__(self, base_url, model=None, max_tokens=8192, at_once=64, key=None, patience=60, folder=None):
        self.url, self.model, self.folder = without_user(base_url), model, None
        self.max_tokens, self.limit, self.at_once, self.patience = max_tokens, "max_tokens", at_once, patience
        self.first = {}                                    # three prompts, and how they were refused
        if folder:
            import policy
            self.folder = policy.resolve(folder)
            self.tokenizer, self.stop = policy.load_tokenizer(self.folder)
        key = key or os.environ.get("OPENAI_API_KEY")
        user, _, password = "".join(re.findall(USER, base_url)).partition(":")
        basic = user and base64.b64encode(unquote(f"{user}:{password}").encode()).decode()
        self.secrets = [x for x in (basic, key, password or user, unquote(password or user)) if x]
        self.headers = {"Authorization": f"Basic {basic}" if basic else f"Bearer {key or 'none'}"}
        # Connections belong to a loop, callers to any loop or thread: so the server has a loop of its own.
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        try:
            asyncio.run_coroutine_threadsafe(self.open(), self.loop).result()
        except Refused as e:
            fail(str(e))
        atexit.register(self.close)

    def about(self):
        return fingerprint(self.folder, self.folder) or [self.url, self.model]

    def close(self):
        asyncio.run_coroutine_threadsafe(self.session.close(), self.loop).result(5)

    async def open(self):
        """Connect. Nobody there is said at once, not after every request's last try."""
        import aiohttp
        self.aiohttp, self.slots, self.window = aiohttp, asyncio.Semaphore(self.at_once), None
        self.session = aiohttp.ClientSession(
            headers=self.headers, trust_env=True, connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600))
        listed = []
        try:
            async with self.session.get(self.url + "/models", timeout=aiohttp.ClientTimeout(10)) as r:
                listed = json.loads(await r.read())["data"]
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError, aiohttp.InvalidURL) as e:
            await self.session.close()
            raise Refused(f"--base-url {self.url}: nobody answers there ({self.said(e)})") from e
        except (TimeoutError, aiohttp.ClientError, ValueError, LookupError, TypeError):
            pass                           # somebody does, though not in the way of such a server
        for one in listed if isinstance(listed, list) else ():
            self.model = self.model or one["id"]
            if one["id"] == self.model:
                self.window = one.get("max_model_len")

    def answers(self, requests):
        """requests: an iterable of (messages, seed, temperature). Yields (place, Answer) as they finish."""
        asked, done, under_way = enumerate(requests), queue.SimpleQueue(), 0
        while True:
            for place, request in itertools.islice(asked, self.at_once - under_way):
                future, = self.submit([request])
                future.add_done_callback(lambda f, place=place: done.put((place, f)))
                under_way += 1
            if not under_way:
                return
            place, future = done.get()
            under_way -= 1
            try:
                yield place, future.result()
            except Refused as e:
                fail(str(e))

    def submit(self, requests, heard=None):
        """-> [Future of an Answer, ...]. heard(place, text): told what there is of a text as it is written.
        Token ids of one temperature and seed are one request, which saves a small model half of its time."""
        futures, groups = [Future() for _ in requests], {}
        for place, (messages, seed, temperature) in enumerate(requests):
            alone, prompt, limit = place, messages, self.max_tokens
            if len(self.first) < 3:
                self.first.setdefault(json.dumps(messages), "")
            if self.folder:
                prompt = encode(self.tokenizer, messages)
                if self.window and (refusal := no_room(len(prompt), self.window)):
                    futures[place].set_result(refusal)
                    continue
                alone = place if heard else None
                limit = min(limit, self.window - len(prompt)) if self.window else limit
            else:
                seed %= 2**31                              # as OpenAI wants it
            key = alone, temperature, seed if temperature else 0, limit
            groups.setdefault(key, []).append((place, prompt))
        for (_, temperature, seed, limit), group in groups.items():
            places, prompts = zip(*group)
            told = heard and functools.partial(heard, places[0])
            settings = {"temperature": temperature, "seed": seed}
            asked = self.by_ids(prompts, limit, settings, told) if self.folder else \
                self.by_chat(prompts[0], settings, told)
            asyncio.run_coroutine_threadsafe(self.ask(asked, [futures[p] for p in places]), self.loop)
        return futures

    async def ask(self, asked, futures):
        """Let the answers that are `asked` for be the futures' results."""
        try:
            async with self.slots:
                answers = await asked
            for future, answer in zip(futures, answers, strict=True):
                future.set_result(answer)
        except BaseException as e:                         # is raised where the answers are awaited
            for future in futures:
                future.set_exception(e)

    async def by_ids(self, prompts, limit, settings, told):
        """Answers to prompts of token ids."""
        # The full softmax, whatever the model's generation_config.json has for who says nothing.
        settings |= {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        reply = await self.post("/completions", told, prompt=prompts, max_tokens=limit, return_token_ids=True,
                                stop_token_ids=self.stop, skip_special_tokens=False, **settings)
        if isinstance(reply, Answer):
            return [reply] * len(prompts)
        try:
            choices = sorted(reply["choices"], key=lambda c: c["index"])
            return [answer_to(self.tokenizer, ids, Sample(c["token_ids"], [], c["finish_reason"] != "length"))
                    for ids, c in zip(prompts, choices, strict=True)]
        except (LookupError, TypeError, ValueError):
            return [no_answer("not a completion with token ids, as vLLM gives them")] * len(prompts)

    async def by_chat(self, messages, settings, told, limited=True):
        """[the answer] to a chat. A refusal is final where the prompt is longer than the window; one that
        leaves less room than `max_tokens` is asked for again without a limit, and gets what there is."""
        limit = {self.limit: self.max_tokens} if limited else {}
        reply = await self.post("/chat/completions", told, messages=messages, **limit, **settings)
        if not isinstance(reply, Answer):
            return [answer_of(reply)]
        if reply.finish.startswith(REFUSED):
            long = bool(TOO_LONG.search(reply.finish))
            if limit and long:
                return await self.by_chat(messages, settings, told, limited=False)
            if "max_tokens" in limit and "max_completion_tokens" in reply.finish:         # OpenAI's o-series
                self.limit = "max_completion_tokens"
                return await self.by_chat(messages, settings, told)
            reply.failed = not long
            if not long and (prompt := json.dumps(messages)) in self.first:
                self.first[prompt] = re.sub(r"\d+", "", reply.finish)
                if len(self.first) == 3 and len(set(self.first.values())) == 1:
                    raise Refused(f"{self.url}: {reply.finish} (so were the first three prompts)")
        return [reply]

    async def post(self, route, told, **body):
        """The server's reply to a request, or an `Answer` that says why there is none. What stays so for all
        requests, a wrong key or model, is raised."""
        body |= {"model": self.model} | ({"stream": True} if told else {})
        wait, end = 0.5, time.monotonic() + self.patience
        while True:
            status = 0
            try:
                async with self.session.post(self.url + route, json=body) as r:
                    if r.status == 200:
                        streams = told and r.content_type == "text/event-stream"
                        return await streamed(r.content, told) if streams else json.loads(await r.read())
                    status, said = r.status, f"{r.status}: {self.said(await r.text(errors='replace'))}"
                    wait = int(after) if (after := r.headers.get("Retry-After", "")).isdigit() else wait
            except (ValueError, RecursionError):
                return no_answer("not JSON")
            except (TimeoutError, self.aiohttp.ClientError, OSError, EOFError) as e:
                said = self.said(e) or type(e).__name__
            if status in (401, 403, 404):
                raise Refused(f"{self.url}: {said} (the key is read from OPENAI_API_KEY, the model is "
                              f"{self.model})")
            if 400 <= status < 500 and status not in (408, 409, 425, 429):
                return Answer("", f"{REFUSED}: {said}", failed=True)
            if time.monotonic() + wait > end:
                return no_answer(said)
            await asyncio.sleep(wait * random.uniform(0.5, 1))      # not all of them at once
            wait = min(2 * wait, 8)

    def said(self, error):
        text = str(error)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text[:300]


def without_user(url):
    """A URL as it may be shown and kept."""
    return USER.sub("", url)


async def streamed(lines, told):
    """A reply that comes in parts, as if it had come at once. told(text): what there is of it so far."""
    ids, text, thought, finish = [], "", "", None
    async for line in lines:
        for c in json.loads(line[5:]).get("choices") or () if line.startswith(b"data: {") else ():
            delta = c.get("delta") or {}
            text += c.get("text") or delta.get("content") or ""
            thought += delta.get("reasoning_content") or delta.get("reasoning") or ""
            ids += c.get("token_ids") or ()
            finish = c.get("finish_reason") or finish
            told(with_thought(thought, text))
    if finish is None:
        raise EOFError("the answer broke off")
    message = {"content": text, "reasoning_content": thought}
    return {"choices": [{"index": 0, "token_ids": ids, "message": message, "finish_reason": finish}],
            "usage": {"completion_tokens": len(ids)}}


def with_thought(thought, text):
    return f"<think>\n{thought}\n</think>\n{text}" if isinstance(thought, str) and thought else text


def answer_of(reply):
    """A chat completion as an `Answer`. Status 200 promises nothing: a proxy's page, a number, a stream or a
    message of other parts than text is no answer."""
    get = lambda x, name: x.get(name) if isinstance(x, dict) else None
    choices = get(reply, "choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    said, usage = get(choice, "message"), get(reply, "usage")
    text = get(said, "content")
    if choice is None:
        return no_answer("not a chat completion")
    if not isinstance(text, str):
        return no_answer("an empty message" if text is None else "a message that is not a text")
    tokens, prompt = (n if isinstance(n := get(usage, f"{kind}_tokens"), int) else 0
                      for kind in ("completion", "prompt"))
    return Answer(with_thought(get(said, "reasoning_content") or get(said, "reasoning"), text),
                  "cut off" if get(choice, "finish_reason") == "length" else "stop", tokens, prompt)


class Scalar:
    """A reward model that gives a number: a sequence classifier with one output from `transformers`."""

    def __init__(self, model, dtype="bfloat16", batch_tokens=16384):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        self.torch, self.batch_tokens = torch, batch_tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True).to(self.device).eval()
        if self.model.config.num_labels != 1:
            fail(f"--model {model}: a classifier with {self.model.config.num_labels} outputs; a reward model "
                 "has one")
        if self.tokenizer.chat_template is None:
            fail(f"--model {model}: its tokenizer has no chat template")
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id

    def scores(self, conversations):
        """Reward of each conversation (messages, the response last). Yields (place, score or None where it is
        longer than the model's window), long ones first, in padded batches of like length."""
        ids = [self.tokenizer.apply_chat_template(plain(self.tokenizer, c), tokenize=True, return_dict=False)
               for c in conversations]
        window = self.model.config.max_position_embeddings
        order, pad = sorted(range(len(ids)), key=lambda i: -len(ids[i])), self.model.config.pad_token_id
        while order:
            long = len(ids[order[0]])
            if long > window:
                yield order.pop(0), None
                continue
            n = max(1, self.batch_tokens // long)
            batch, order = order[:n], order[n:]
            tensor = lambda rows: self.torch.tensor(rows, device=self.device)
            tokens = tensor([ids[i] + [pad] * (long - len(ids[i])) for i in batch])
            mask = tensor([[1] * len(ids[i]) + [0] * (long - len(ids[i])) for i in batch])
            with self.torch.no_grad():
                rewards = self.model(input_ids=tokens, attention_mask=mask).logits[:, 0].float().tolist()
            yield from zip(batch, rewards)


class Journal:
    """Every answer, one line of JSON, as it comes, found by `asked`: the digest of all that could change it.
    So it is cache, resume and bill in one: what was killed, or asked before, is not asked again. Without a
    path it lasts as long as the process. failed: why the last request without an answer got none."""

    KEPT = ("text", "finish", "tokens", "prompt_tokens")

    def __init__(self, path=None):
        self.path, self.failed, self.answers, self.file, self.lock = path, "", {}, None, threading.Lock()
        if path:
            self.answers = {row.get("asked", str(row.get("key"))): row for row in read_lines(path)}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, map(json.dumps, self.answers.values()))   # without a line that a kill cut short
            self.file = open(path, "a")

    def found(self, asked):
        """-> `Answer`, None if it has none"""
        row = self.answers.get(asked)
        return row and Answer(**{name: row[name] for name in self.KEPT}, origin="cached")

    def add(self, asked, answer, **about):
        """about: what else the line says, for people to read."""
        self.answers[asked] = row = about | {"asked": asked} | {k: getattr(answer, k) for k in self.KEPT}
        try:
            if self.file:
                with self.lock:                          # of a judge that several threads ask
                    self.file.write(json.dumps(row) + "\n")
                    self.file.flush()
        except OSError as e:
            fail(f"{self.path}: cannot be written ({e.strerror}); the answers in it are kept")
