"""
The judge over HTTP: a thin gateway in front of vLLM's own server, and a page to watch it think.

    python -m serve --model runs/demo/grpo/model --dtype float32          # http://127.0.0.1:8080
    python -m serve --model gaotang/RM-R1-Qwen2.5-Instruct-7B -- --data-parallel-size 8
    python -m serve --model MODEL --upstream http://node0:8000/v1         # a vLLM that runs, or a balancer

    curl 127.0.0.1:8080/compare --json '{"prompt": "What is 6 * 7 ?", "a": "Here: 42", "b": "Here: 45"}'

/compare, /rank, /score and /reward are our own routes; /get_reward is the one that OpenRLHF asks. A trainer that sends
one sample at a time says how large its groups are: a sample waits for the others of its group and then gets
its own reward. RMR1_API_KEY guards all routes but /health. docs/serving.md has the formats.
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

from judge.backends import backend_flags, read_url
from judge.journal import Journal
from lib import model_files
from lib.chat import encode
from lib.engine import on_cpu
from lib.files import Failure, Flags, number, run_main
from lib.pairs import Pair, messages_of
from rmr1 import Judge, rubric_flag
from rubrics import chat_messages, prompt_style
from serve.gateway import Gate, make_app, say

THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
LIBC = ctypes.CDLL(None)
# A program that becomes the one in its arguments, after it has asked the kernel for a SIGTERM at its parent's
# end (PR_SET_PDEATHSIG, which is 1). In a `preexec_fn` the same would run between fork and exec, where a lock
# that another thread of ours held would stay locked for ever.
END_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
M_MMAP_THRESHOLD = -3  # of mallopt: the bytes from which a block is mapped by itself

# ---------------------------------------------------------------- vLLM, started and kept running


class Upstream:
    """The model's server: vLLM's own, started for the model, or with --upstream one that runs already.

    is_ready  whether it answers

    A server of ours that ends is started again. Requests that it had not answered are sent again meanwhile
    (`judge.backends.ServerBackend`).
    """

    def __init__(self, args, vllm_arguments):
        self.url = args.upstream
        self.key = None
        self.is_ready = False
        self.command = None
        self.process = None
        self.log = Path(args.journal).with_name("vllm.log")
        if not self.url:
            self.reserved = reserve_port()
            port = self.reserved.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}/v1"
            self.key = secrets.token_hex(16)
            self.command = vllm_command(args, port, vllm_arguments)
        url, query = read_url(self.url, "--upstream")
        self.models_url = f"{url}/models{query}"

    async def keep_running(self):
        """Start the server and start it again whenever it ends. Raises Failure if it was never ready."""
        while True:
            if self.command:
                await self.start()
            was_ready = await self.watch()
            self.kill_group()
            if not was_ready:
                last_lines = self.log.read_text(errors="replace").splitlines()[-20:]
                message = f"vLLM ended before it was ready; {self.log} ends in"
                raise Failure("\n".join([message, *last_lines]))
            say(f"vLLM has ended ({self.process.returncode}); it is started again")

    async def start(self):
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "VLLM_API_KEY": self.key}
        with open(self.log, "ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def watch(self):
        """Ask the server whether it answers until it ends. Returns whether it has ever answered."""
        was_ready = False
        timeout = aiohttp.ClientTimeout(10)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=True) as session:
            while self.process is None or self.process.returncode is None:
                try:
                    async with session.get(self.models_url) as response:
                        self.is_ready = response.status < 500
                except (TimeoutError, aiohttp.ClientError, OSError):
                    self.is_ready = False
                was_ready |= self.is_ready
                await asyncio.sleep(0.2)
        self.is_ready = False
        return was_ready

    async def end(self):
        if self.process and self.process.returncode is None:
            self.process.terminate()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.process.wait(), 10)
            self.kill_group()

    def kill_group(self):
        """Kill what is left of the server's processes: an engine whose server was killed would keep its card."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def reserve_port():
    """A socket that keeps a free port for vLLM, also while vLLM is started again.

    Nobody is given a port that is bound. vLLM can bind it all the same, because both sockets have
    SO_REUSEADDR and this one never listens.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def vllm_command(args, port, vllm_arguments):
    """The command line of vLLM's server, with the engine's settings of `lib.engine`, so that a seed gives the
    same text here as there."""
    if torch.cuda.is_available():
        command = ["vllm.entrypoints.cli.main", "serve", str(args.folder)]
    else:  # vLLM's wheel for CPUs has no `vllm serve`
        command = ["vllm.entrypoints.openai.api_server", "--model", str(args.folder)]
        for name, value in on_cpu(args.max_len).items():
            flag = name.replace("_", "-")
            if value is True:
                command.append(f"--{flag}")
            elif value is False:
                command.append(f"--no-{flag}")
            else:
                command += [f"--{flag}", str(value)]
    settings = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": "judge",
        "--dtype": args.dtype,
        "--max-model-len": args.max_len,
        "--load-format": "safetensors",
        "--config-format": "hf",
        "--hf-overrides": '{"head_dtype": "float32"}',
    }
    for flag, value in settings.items():
        command += [flag, str(value)]
    quiet = ["--disable-log-stats", "--disable-uvicorn-access-log"]
    vllm = [sys.executable, "-m", *command, *quiet, *vllm_arguments]
    return [sys.executable, "-c", END_WITH_PARENT, *vllm]


# ---------------------------------------------------------------- arguments


def arguments():
    """The gateway's arguments, and those behind -- for vLLM."""
    own, vllm_arguments = sys.argv[1:], []
    if "--" in own:
        place = own.index("--")
        own, vllm_arguments = own[:place], own[place + 1 :]

    ap = Flags(
        __doc__, epilog="What stands behind -- goes to vLLM, such as --data-parallel-size 8."
    )
    arg = ap.add_argument
    backend_flags(
        ap,
        "model protocol system-prompt journal temperature seed max-tokens max-len dtype",
        journal="runs/serve/journal.jsonl",
    )
    rubric_flag(arg)
    arg(
        "--upstream",
        help="OpenAI-compatible URL that has the model; default: vLLM's server, started for it",
    )
    arg(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0, every one of this machine, needs RMR1_API_KEY",
    )
    arg("--port", type=number(int, 1, 65535), default=8080, help="port to listen at")
    arg(
        "--group-size",
        type=number(int, 2),
        help="samples of a prompt, where /get_reward gets one at a time",
    )
    arg(
        "--group-timeout",
        type=number(float, 0, above=True),
        default=120.0,
        help="seconds after its last sample at which a group is judged that is not whole",
    )
    arg("--most", type=number(int, 2), default=32, help="responses of one prompt at most")
    arg("--most-bytes", type=number(int, 1), default=8 << 20, help="bytes of a request at most")
    arg(
        "--patience",
        type=number(float, 0),
        default=600.0,
        help="seconds for which requests to a model's server that is away are repeated",
    )
    arg(
        "--grace",
        type=number(float, 0),
        default=30.0,
        help="seconds at the end for what is under way",
    )
    args = ap.parse_args(own)
    args.key = os.environ.get("RMR1_API_KEY", "").strip()
    return args, vllm_arguments


def check_address(args):
    """Raises Failure where the gateway cannot listen at its address, or would serve everybody."""
    if args.host not in THIS_MACHINE and not args.key:
        raise Failure(
            f"--host {args.host}: whoever reaches this machine could use the judge; set RMR1_API_KEY "
            "to a key that callers must have, or leave --host out"
        )
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except OSError as error:
            raise Failure(f"--host {args.host} --port {args.port}: {error.strerror}")


def find_judge(args):
    """Set args.folder, args.max_len and args.style. Raises Failure where vLLM could not load the model, or would
    load it and not know how it wants to be asked."""
    args.folder = args.model
    args.style = None  # a server's model says it by its name
    if not args.upstream or Path(args.model).is_dir():
        args.folder = model_files.find_model(args.model)
    if not args.upstream:
        window = model_files.window_of(model_files.config_of(args.folder))
        model_files.check_weights(args.model, args.folder)
        args.max_len = min(args.max_len or window, window)
        args.style = prompt_style(args.folder, args.model, args.protocol, args.system_prompt)


# ---------------------------------------------------------------- start and end


class GatewayServer(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn raises them again at its end, before vLLM could be ended."""

    @contextmanager
    def capture_signals(self):
        yield


def gateway_server(gate, args):
    config = uvicorn.Config(
        make_app(gate),
        args.host,
        args.port,
        log_level="error",
        lifespan="off",
        http="h11",  # which bounds headers
        timeout_graceful_shutdown=int(args.grace) + 5,
    )
    return GatewayServer(config)


async def load_judge(upstream, args):
    """The judge, once the model's server answers. Raises Failure if it cannot be asked."""
    while not upstream.is_ready:
        await asyncio.sleep(0.1)
    judge = await asyncio.to_thread(
        Judge,
        str(args.folder),
        protocol=args.protocol,
        system_prompt=args.system_prompt,
        base_url=upstream.url,
        style=args.style,
        flag="--upstream",
        journal=args.journal,
        temperature=args.temperature,
        seed=args.seed,
        max_tokens=args.max_tokens,
        rubric=args.rubric,
        at_once=1024,
        patience=args.patience,
        key=upstream.key,
    )
    if judge.backend.folder:  # a template that refuses such chats does so now, not in a request
        pair = Pair("", messages_of("question"), "a", "b", None)
        encode(judge.backend.tokenizer, chat_messages(pair, judge.style))
    return judge


async def run_judge(gate, args):
    """Give the gate its judge, and say every ten seconds what it has done."""
    address = f"http://{args.host}:{args.port}"
    say(f"{address}: {args.model} is loading")
    gate.judge = judge = await load_judge(gate.upstream, args)
    say(f"{address}: ready; {len(judge.journal.answers):,} judgments are in {args.journal}")

    before = Counter()
    while True:
        await asyncio.sleep(10)
        total = judge.used.copy()
        recent = total - before
        before = total
        if recent:
            say(
                f"in 10 s {recent['judgments']:,} judgments, {recent['cached']:,} from the journal, "
                f"{recent['completion_tokens']:,} tokens written"
            )


async def serve(args, vllm_arguments):
    """Serve until a signal. Raises Failure if the judge cannot be loaded or vLLM does not start."""
    gate = Gate(
        key=args.key,
        host=args.host,
        most=args.most,
        most_bytes=args.most_bytes,
        group_size=args.group_size,
        group_timeout=args.group_timeout,
    )
    gate.upstream = Upstream(args, vllm_arguments)
    server = gateway_server(gate, args)

    def close():
        is_second_signal = server.should_exit
        gate.close(0 if is_second_signal else args.grace)
        server.should_exit = True

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signal_number, close)

    serving = asyncio.create_task(server.serve())
    keeping = asyncio.create_task(gate.upstream.keep_running())
    judging = asyncio.create_task(run_judge(gate, args))
    try:
        await asyncio.wait([serving, keeping, judging], return_when=asyncio.FIRST_COMPLETED)
        ended = [task for task in (judging, keeping) if task.done()]
        if not serving.done():
            close()
            await serving
    finally:
        keeping.cancel()
        judging.cancel()
        await gate.upstream.end()
    for task in ended:
        task.result()  # raises what ended it


def allow_connections():
    """Raise the limit of open files: each sample that waits holds a connection, and 1,024 are soon spent."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        limit = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def main():
    args, vllm_arguments = arguments()
    check_address(args)
    find_judge(args)
    Journal(
        Path(args.journal)
    )  # refuses a file that cannot be one before vLLM loads, and keeps it to this process
    # A fixed threshold returns the memory of a burst of long texts. By itself glibc raises the threshold and
    # then keeps some four times the bytes of the texts.
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 17)
    allow_connections()
    asyncio.run(serve(args, vllm_arguments))


if __name__ == "__main__":
    run_main(main)
