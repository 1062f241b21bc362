"""
Who answers: a model in this process, a server, a model that gives a number; and the journal of what they said.

`Local` and `Server` take (messages, seed, temperature) and give an `Answer` each, in the order in which they
come. Whoever asks (evaluation, distillation, the judge of rmr1.py) asks them alike.
"""
import base64
import itertools
import json
import os
import queue
import re
import threading
from dataclasses import dataclass
from urllib.parse import unquote

from engine import Engine, text_of
from files import fail, read_lines, write_lines
from rubrics import encode, plain


@dataclass
class Answer:
    """What came back for one chat. finish: "stop"; "cut off" at the length limit; else why there is no text.
    failed: worth asking again."""
    text: str
    finish: str
    tokens: int = 0
    prompt_tokens: int = 0
    failed: bool = False


class Local:
    """A model in this process, or one in every rank, by vLLM. `model/config.json` means random weights."""

    def __init__(self, model, max_tokens, max_len=None, dtype="bfloat16", memory=0.9, seed=0, tp=1):
        import policy
        import ranks
        self.folder = policy.resolve(model)
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

    def answers(self, requests):
        """requests: an iterable of (messages, seed, temperature). Yields (place, Answer) as they finish."""
        asked, refused = {}, []

        def prompts():
            for place, (messages, seed, temperature) in enumerate(requests):
                ids = encode(self.tokenizer, messages)
                if len(ids) < self.window:
                    asked[len(asked)] = place, ids
                    yield ids, seed, temperature
                else:
                    why = ("prompt longer than" if len(ids) > self.window else
                           "prompt leaves no room for a judgment in") + f" the window of {self.window} tokens"
                    refused.append((place, Answer("", why, prompt_tokens=len(ids))))

        for at, s in self.engine.stream(prompts(), self.max_tokens, self.stop, logprobs=False):
            place, ids = asked[at]
            asked[at] = None
            yield place, Answer(text_of(self.tokenizer, ids, s), "stop" if s.finished else "cut off",
                                len(s.tokens), len(ids))
        yield from refused


# A server's words for a prompt that its window has no room for.
TOO_LONG = re.compile(r"(?i)context.?(length|size|window)|"
                      r"(prompt|input)\b.{0,40}(too long|too large|longer than|exceeds)")
REFUSED = "refused by the server"
USER = re.compile(r"(?<=//)([^/]*)@")      # name and password, which can stand before a URL's host


class Server:
    """A model behind an OpenAI-compatible endpoint. The key comes from OPENAI_API_KEY; a server of one's own
    needs none. `at_once` requests are under way together; limits and failures are tried again, later and
    later. What a server says is passed on without key and password, which some repeat."""

    def __init__(self, base_url, model, max_tokens, at_once=64, key=None, retries=5):
        import httpx
        import openai
        self.openai, self.model, self.max_tokens, self.at_once = openai, model, max_tokens, at_once
        self.url, self.limit = without_user(base_url), "max_tokens"
        key = key or os.environ.get("OPENAI_API_KEY")
        user, _, password = "".join(re.findall(USER, base_url)).partition(":")
        basic = user and base64.b64encode(unquote(f"{user}:{password}").encode()).decode()
        self.secrets = [x for x in (basic, key, password or user, unquote(password or user)) if x]
        try:                               # nobody there: said at once, not after every request's last try
            httpx.get(base_url, timeout=10)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL,
                ValueError) as e:
            fail(f"--base-url {self.url}: nobody answers there ({self.said(e)})")
        except httpx.HTTPError:            # somebody does, though not in the way of a web server
            pass
        self.client = openai.OpenAI(base_url=base_url, max_retries=retries, api_key=key or "none",
                                    timeout=httpx.Timeout(600, connect=10))

    def answers(self, requests):
        """requests: an iterable of (messages, seed, temperature). Yields (place, Answer) as they finish.

        A server that refuses the first three different prompts alike would refuse all, so that is an end.
        The threads are daemons: whoever stops waits for none of them."""
        asked, done, under_way, first = enumerate(requests), queue.SimpleQueue(), 0, {}

        def work(place, request):
            try:
                done.put((place, self.ask(*request)))
            except BaseException as e:                 # is raised where the answers are awaited
                done.put((place, e))

        while True:
            for place, request in itertools.islice(asked, self.at_once - under_way):
                if len(first) < 3 and request[0] not in [messages for messages, _ in first.values()]:
                    first[place] = request[0], ""
                threading.Thread(target=work, args=(place, request), daemon=True).start()
                under_way += 1
            if not under_way:
                return
            place, answer = done.get()
            under_way -= 1
            if isinstance(answer, self.openai.APIStatusError):
                fail(f"{self.url}: {self.said(answer)} (the key is read from OPENAI_API_KEY, the model is "
                     f"{self.model})")
            if isinstance(answer, BaseException):
                raise answer
            if place in first and answer.failed and answer.finish.startswith(REFUSED):
                first[place] = first[place][0], re.sub(r"\d+", "", answer.finish)
                if len(first) == 3 and len({why for _, why in first.values()}) == 1:
                    fail(f"{self.url}: {answer.finish} (so were the first three prompts)")
            yield place, answer

    def ask(self, messages, seed, temperature, limit=None):
        """One answer. A wrong key or model is raised: no other request would fare better. A refusal is final
        where the prompt is longer than the window; one that leaves some room, though less than `max_tokens`,
        is asked for again without a limit, and gets what room there is."""
        limit = {self.limit: self.max_tokens} if limit is None else limit
        try:
            done = self.client.chat.completions.create(model=self.model, messages=messages, **limit,
                                                       temperature=temperature, seed=seed % 2**31)
        except (self.openai.AuthenticationError, self.openai.PermissionDeniedError,
                self.openai.NotFoundError):
            raise
        except self.openai.BadRequestError as e:
            long = bool(TOO_LONG.search(str(e)))
            if limit and long:
                return self.ask(messages, seed, temperature, {})
            if "max_tokens" in limit and "max_completion_tokens" in str(e):       # OpenAI's o-series
                self.limit = "max_completion_tokens"
                return self.ask(messages, seed, temperature)
            return Answer("", f"{REFUSED}: {self.said(e)}", failed=not long)
        except (self.openai.OpenAIError, ValueError, RecursionError) as e:
            return Answer("", f"no answer from the server: {self.said(e)}", failed=True)
        return answer_of(done)

    def said(self, error):
        text = str(error)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text[:300]


def without_user(url):
    """A URL as it may be shown and kept."""
    return USER.sub("", url)


def answer_of(done):
    """A server's reply as an `Answer`. Status 200 promises nothing: a proxy's page, a number, a stream or a
    message of other parts than text is no answer."""
    choices = getattr(done, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    said, usage = getattr(choice, "message", None), getattr(done, "usage", None)
    text = getattr(said, "content", None)
    if not isinstance(text, str):
        why = "not a chat completion" if choice is None else "an empty message" if text is None else \
            "a message that is not a text"
        return Answer("", f"no answer from the server: {why}", failed=True)
    thought = getattr(said, "reasoning_content", None) or getattr(said, "reasoning", None)
    if isinstance(thought, str) and thought:
        text = f"<think>\n{thought}\n</think>\n{text}"
    tokens, prompt = (n if isinstance(n := getattr(usage, f"{kind}_tokens", 0), int) else 0
                      for kind in ("completion", "prompt"))
    finish = "cut off" if getattr(choice, "finish_reason", None) == "length" else "stop"
    return Answer(text, finish, tokens, prompt)


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
    """Every answer, one line of JSON, as it comes, found by `asked`: the digest of all that could change it. So it
    is cache, resume and bill in one: what was killed, or asked before, is not asked again. Without a path it
    lasts as long as the process. failed: why the last request without an answer got none."""

    def __init__(self, path=None):
        self.path, self.failed, self.answers, self.file, self.lock = path, "", {}, None, threading.Lock()
        if path:
            self.answers = {row.get("asked", str(row.get("key"))): row for row in read_lines(path)}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, map(json.dumps, self.answers.values()))   # without a line that a kill cut short
            self.file = open(path, "a")

    def found(self, asked):
        row = self.answers[asked]
        return Answer(row["text"], row["finish"], row["tokens"], row["prompt_tokens"])

    def add(self, asked, answer, **about):
        """about: what else the line says, for people to read."""
        row = about | {"asked": asked, "text": answer.text, "finish": answer.finish, "tokens": answer.tokens,
                       "prompt_tokens": answer.prompt_tokens}
        self.answers[asked] = row
        try:
            if self.file:
                with self.lock:                          # of a judge that several threads ask
                    self.file.write(json.dumps(row) + "\n")
                    self.file.flush()
        except OSError as e:
            fail(f"{self.path}: cannot be written ({e.strerror}); the answers in it are kept")
