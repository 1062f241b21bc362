"""
What does the gateway cost? 64 clients at once, beside the same work in one process.

    OMP_NUM_THREADS=1 python bench/serving.py                  # the demo's judge

Groups of 8 responses (bench/best_of_n.py's questions), other ones in every turn, so that no journal helps:

    served    serve.py, started for this; 64 clients post a group each to /reward, and then the next
    cohorts   the same one sample at a time, as OpenRLHF sends them; a third of the callers leave while they
              wait, and ask again
    offline   Judge(model), after each of these with its groups: all together, by vLLM in this process

Medians of turns; lost: samples without the reward that offline gives them.
"""
import asyncio
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from statistics import median

import aiohttp
import common
from best_of_n import candidates, questions
from files import Flags, number
from rmr1 import Judge, all_of, now

CLIENTS, N, LEAVE = 64, 8, 1 / 3            # at once; responses of a group; share of callers who leave


def groups(count, name):
    """-> [(question, its responses), ...]: the same questions whatever the name, with other openers"""
    rng, some = random.Random(name), (questions() * count)[:count]
    return [(question, list(next(candidates(right, wrong, N, rng)))) for question, right, wrong in some]


async def served(url, work, ask):
    """All clients, each with a group after the other. ask: `whole` or `one_by_one`. -> [rewards, ...]"""
    clients = asyncio.Semaphore(CLIENTS)
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        async def client(k, group):
            async with clients:
                return await ask(session, k, *group)
        return await all_of(client(*some) for some in enumerate(work))


async def whole(session, _, question, responses):
    """Group k in one request."""
    body = {"prompts": [question] * len(responses), "completions": responses}
    async with session.post("/reward", json=body) as r:
        return (await r.json())["rewards"]


async def one_by_one(session, k, question, responses):
    """Group k in a request for each sample, in any order; a caller who leaves does so after a moment."""
    async def sample(text, leaves):
        body = {"query": [f"{question}{text}"], "prompts": [question], "labels": [""]}
        for timeout in [0.02, 600] if leaves else [600]:
            try:
                async with session.post(f"/get_reward?group={N}&cohort={k}", json=body,
                                        timeout=aiohttp.ClientTimeout(timeout)) as r:
                    return ((await r.json())["rewards"] or [None])[0]
            except TimeoutError:
                pass

    rng = random.Random(k)
    places = rng.sample(range(N), N)
    found = dict(zip(places, await all_of([sample(responses[i], rng.random() < LEAVE) for i in places])))
    return [found[i] for i in range(N)]


def until_ready(url, process):
    while process.poll() is None:
        try:
            return urllib.request.urlopen(url + "/health")
        except OSError:
            time.sleep(0.5)
    sys.exit("serve.py has ended")


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--model", default="runs/demo/grpo/model", help="a judge's folder")
    arg("--groups", type=number(int, 1), default=128, help="groups a turn")
    arg("--turns", type=number(int, 1), default=3, help="turns of each")
    arg("--port", type=number(int, 1, 65535), default=8012, help="of the gateway")
    args = ap.parse_args()
    url, where = f"http://127.0.0.1:{args.port}", f"runs/bench/serving-{time.time():.0f}.jsonl"
    process = subprocess.Popen([sys.executable, "serve.py", "--model", args.model, "--dtype", "float32",
                                "--max-tokens", "56", "--max-len", "200", "--port", str(args.port),
                                "--journal", where], cwd=common.ROOT)
    times, lost = {"offline": [], "served": [], "cohorts": []}, Counter()
    try:
        judge = Judge(args.model, dtype="float32", max_tokens=56, max_len=200)
        until_ready(url, process)
        for turn in range(args.turns + 1):
            for name, ask in (("served", whole), ("cohorts", one_by_one)):
                work = groups(args.groups, f"{name} {turn}")
                seconds, rewards = common.timed(now, served(url, work, ask))
                base, expected = common.timed(now, all_of(judge.agroup(*group) for group in work))
                if turn:                                         # the first warms up
                    times[name].append(seconds)
                    times["offline"].append(base)
                    lost[name] += sum(a != b for got, (some, _) in zip(rewards, expected)
                                      for a, (b, _) in zip(got, some))
    finally:
        process.terminate()
        process.wait()
    rows = [{"": name, "seconds": median(s), "times offline": median(s) / median(times["offline"]),
             "judgments/s": args.groups * 4 * N / median(s), "lost": lost[name],
             "each turn": ", ".join(f"{x:.2f}" for x in s)} for name, s in times.items()]
    common.report(rows)


if __name__ == "__main__":
    main()
