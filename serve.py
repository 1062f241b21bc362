"""
The judge over HTTP: a thin gateway in front of vLLM's own server, and a page to watch it think.

    python serve.py --model runs/demo/grpo/model --dtype float32          # http://127.0.0.1:8080
    python serve.py --model gaotang/RM-R1-Qwen2.5-Instruct-7B -- --data-parallel-size 8
    python serve.py --model MODEL --upstream http://node0:8000/v1         # a vLLM that runs, or a balancer

    curl 127.0.0.1:8080/compare --json '{"prompt": "What is 6 * 7 ?", "a": "Here: 42", "b": "Here: 45"}'

/compare, /rank, /reward; /rerank, /v1/rerank, /v2/rerank as Cohere, Jina and LiteLLM ask; /get_reward as
OpenRLHF does. A trainer that sends one sample at a time says how large its groups are: samples wait for their
**cohort**, and each is told its own reward. RMR1_API_KEY guards all but /health. docs/serving.md has formats.
"""
import asyncio
import ctypes
import os
import resource
import secrets
import signal
import socket
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import aiohttp
import torch
import uvicorn

import policy
from askers import flags
from engine import on_cpu
from files import Flags, claim, fail, number
from gateway import Gate, app_of, say
from rmr1 import Judge
from rubrics import Pair, chat_messages, encode, messages_of, prompt_form


# ---------------------------------------------------------------- vLLM, started and kept running

class Upstream:
    """vLLM's own server for a model, or one that runs already. ready: does it answer? One of ours that ends
    is started again, while what waited for it is asked again (`askers.Server`)."""

    def __init__(self, args, more):
        self.url, self.key, self.ready, self.command, self.process = args.upstream, None, False, None, None
        self.log = Path(args.journal).with_name("vllm.log")
        if self.url:
            return
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url, self.key = f"http://127.0.0.1:{port}/v1", secrets.token_hex(16)
        # As `Engine` has it, so that a seed gives the same text. The wheel for CPUs has no `vllm serve`.
        start = ["vllm.entrypoints.cli.main", "serve", args.folder]
        if not torch.cuda.is_available():
            start = ["vllm.entrypoints.openai.api_server", "--model", args.folder]
            for name, value in on_cpu(args.max_len).items():
                flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
                start += [flag] if isinstance(value, bool) else [flag, value]
        self.command = [sys.executable, "-m", *map(str, start), "--host", "127.0.0.1", "--port", str(port),
                        "--served-model-name", "judge", "--dtype", args.dtype, "--max-model-len",
                        str(args.max_len), "--hf-overrides", '{"head_dtype": "float32"}',
                        "--disable-log-stats", "--disable-uvicorn-access-log", *more]

    async def keep(self):
        """Keep it running. RuntimeError if it ends without having been ready."""
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        while True:
            if self.command:
                with open(self.log, "ab") as log:
                    self.process = await asyncio.create_subprocess_exec(
                        *self.command, env=env | {"VLLM_API_KEY": self.key}, stdout=log, stderr=log,
                        start_new_session=True,
                        preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM))     # PR_SET_PDEATHSIG
            was_ready = await self.watch()
            self.kill_group()
            if not was_ready:
                words = self.log.read_text(errors="replace").splitlines()[-20:]
                raise RuntimeError("\n".join([f"vLLM ended before it was ready; {self.log} ends in", *words]))
            say(f"vLLM has ended ({self.process.returncode}); it is started again, what waits is asked again")

    async def watch(self):
        """Until it ends. -> was it ready at any time?"""
        was_ready = False
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10), trust_env=True) as session:
            while self.process is None or self.process.returncode is None:
                try:
                    async with session.get(self.url + "/models") as r:
                        self.ready = r.status < 500
                except (TimeoutError, aiohttp.ClientError, OSError):
                    self.ready = False
                was_ready |= self.ready
                await asyncio.sleep(0.2)
        self.ready = False
        return was_ready

    async def end(self):
        if self.process and self.process.returncode is None:
            self.process.terminate()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.process.wait(), 10)
            self.kill_group()

    def kill_group(self):
        """What is left of it: an engine whose server was killed would keep its card."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


# ---------------------------------------------------------------- start and end

class Server(uvicorn.Server):
    """Leaves signals to `run`: uvicorn's own way raises them again at its end, before vLLM could be ended."""
    @contextmanager
    def capture_signals(self):
        yield


def arguments():
    ap = Flags(__doc__, epilog="What stands behind -- goes to vLLM, such as --data-parallel-size 8.")
    arg = ap.add_argument
    flags(ap, "model protocol system-prompt journal temperature seed max-tokens max-len dtype",
          journal="runs/serve/journal.jsonl")
    arg("--upstream", help="OpenAI-compatible URL that has the model; default: vLLM's server, started for it")
    arg("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: everybody's")
    arg("--port", type=number(int, 1, 65535), default=8080, help="port to listen at")
    arg("--group", type=number(int, 2), help="samples a prompt, where /get_reward is sent one at a time")
    arg("--group-timeout", type=number(float, 0, above=True), default=120.0,
        help="seconds after its last sample at which a group is judged that is not whole")
    arg("--most", type=number(int, 2), default=32, help="responses of one prompt at most")
    arg("--most-bytes", type=number(int, 1), default=8 << 20, help="bytes of a request at most")
    arg("--patience", type=number(float, 0), default=600.0,
        help="seconds for which a server that is away is asked again")
    arg("--grace", type=number(float, 0), default=30.0, help="seconds at the end for what is under way")
    more = sys.argv[sys.argv.index("--") + 1:] if "--" in sys.argv else []
    args = ap.parse_args(sys.argv[1:len(sys.argv) - len(more) - bool("--" in sys.argv)])
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((args.host, args.port))
        except OSError as e:
            fail(f"--host {args.host} --port {args.port}: {e.strerror}")
    args.folder = args.model
    if not args.upstream or Path(args.model).is_dir():
        args.folder = policy.resolve(args.model)
    if not args.upstream:
        policy.check_weights(args.model, args.folder)
        window = policy.config_of(args.folder).max_position_embeddings
        args.max_len = min(args.max_len or window, window)
        prompt_form(args.folder, args.model, args.protocol, args.system_prompt)     # or its sentence, now
    return args, more


async def run(args, more):
    """Serve until a signal. -> why it ended, if not by one"""
    gate = Gate(None, os.environ.get("RMR1_API_KEY", "").strip(), args.host, args.most, args.most_bytes,
                args.group, args.group_timeout)
    gate.upstream = upstream = Upstream(args, more)
    server = Server(uvicorn.Config(app_of(gate), args.host, args.port, log_level="error", lifespan="off",
                                   http="h11",                                          # which bounds headers
                                   timeout_graceful_shutdown=int(args.grace) + 5))

    def close():
        gate.close(0 if server.should_exit else args.grace)         # asked twice: at once
        server.should_exit = True

    for sign in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sign, close)

    async def judging():
        say(f"http://{args.host}:{args.port}: {args.model} is loading")
        while not upstream.ready:
            await asyncio.sleep(0.1)
        judge = await asyncio.to_thread(
            Judge, str(args.folder), args.protocol, args.system_prompt, upstream.url, args.journal,
            args.temperature, args.seed, args.max_tokens, at_once=1024, patience=args.patience,
            key=upstream.key)
        if judge.asker.folder:              # a template that refuses such chats does so now, not in a request
            pair = Pair("", messages_of("question"), "a", "b", None)
            encode(judge.asker.tokenizer, chat_messages(pair, *judge.form))
        gate.judge = judge
        known = len(judge.journal.answers)
        say(f"http://{args.host}:{args.port}: ready; {known:,} judgments are in {args.journal}")

        told = Counter()
        while True:
            await asyncio.sleep(10)
            used = gate.judge.used.copy()
            if new := used - told:
                say(f"in 10 s {new['judgments']:,} judgments, {new['cached']:,} from the journal, "
                    f"{new['completion_tokens']:,} tokens written")
            told = used

    serving, keeping, judges = map(asyncio.ensure_future, (server.serve(), upstream.keep(), judging()))
    why = None
    try:
        await asyncio.wait([serving, keeping, judges], return_when=asyncio.FIRST_COMPLETED)
        why = next((str(task.exception()) for task in (judges, keeping) if task.done()), None)
        if not serving.done():
            close()
            await serving
    finally:
        for task in (keeping, judges):
            task.cancel()
        await upstream.end()
    return why


def main():
    args, more = arguments()
    # M_MMAP_THRESHOLD, fixed: else glibc keeps what a burst of long texts took, some four times their bytes.
    ctypes.CDLL(None).mallopt(-3, 1 << 17)
    claim(Path(args.journal).parent)
    # Every sample that waits holds a connection; 1,024 files, a usual limit, are soon spent.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    if why := asyncio.run(run(args, more)):
        fail(why)


if __name__ == "__main__":
    main()
