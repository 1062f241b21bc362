"""
What does the gateway cost? 64 clients at once, beside the same work in one process.

    OMP_NUM_THREADS=1 python bench/serving.py                  # the demo's judge

Groups of 8 responses (bench/best_of_n.py's questions), other ones in every turn, so that no journal helps:

    offline   Judge(model): all groups together, by vLLM in this process
    served    serve.py, started for this; 64 clients post a group each to /reward, and then the next
    cohorts   the same groups one sample at a time, as OpenRLHF sends them; a third of the callers leave while they
              wait, and ask again

seconds and judgments a second of a turn; lost: samples without the reward that offline gives them.
"""
import asyncio
import random
import subprocess
import sys
import time
import urllib.request
from statistics import median

import aiohttp
import common
from best_of_n import candidates, questions
from files import Flags, number
from rmr1 import Judge, all_of, now


def groups(args, turn):
    """-> [(question, its responses), ...]: the same questions in every turn, with other openers"""
    rng, asked = random.Random(f"turn {turn}"), questions()
    some = [asked[k % len(asked)] for k in range(args.groups)]
    return [(question, list([*candidates(right, wrong, args.n, 0.3, rng)][0])) for question, right, wrong in some]


async def served(url, work, clients):
    """Whole groups, by so many clients. -> [rewards of a group, ...]"""
    found, todo = [None] * len(work), iter(enumerate(work))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async def client():
            for k, (question, responses) in todo:
                body = {"prompts": [question] * len(responses), "completions": responses}
                async with session.post(url + "/reward", json=body) as r:
                    found[k] = (await r.json())["rewards"]
        await asyncio.gather(*[client() for _ in range(clients)])
    return found


async def cohorts(url, work, clients, leave):
    """One sample at a time; a share of the callers leave after a moment, and ask again."""
    found, todo, rng = [[None] * len(some) for _, some in work], iter(enumerate(work)), random.Random(0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async def sample(k, i, question, text):
            body = {"query": [f"{question}{text}"], "prompts": [question], "labels": [""]}
            for timeout in ([0.02] if rng.random() < leave else []) + [600]:
                try:
                    async with session.post(f"{url}/get_reward?group={len(work[k][1])}&cohort={k}", json=body,
                                            timeout=aiohttp.ClientTimeout(timeout)) as r:
                        found[k][i] = ((await r.json())["rewards"] or [None])[0]
                        return
                except TimeoutError:
                    pass

        async def client():
            for k, (question, some) in todo:
                places = rng.sample(range(len(some)), len(some))
                await asyncio.gather(*[sample(k, i, question, some[i]) for i in places])
        await asyncio.gather(*[client() for _ in range(clients)])
    return found


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
    arg("--max-tokens", type=number(int, 1), default=56, help="longest judgment")
    arg("--n", type=number(int, 2, 16), default=8, help="responses of a group")
    arg("--groups", type=number(int, 1), default=128, help="groups a turn")
    arg("--clients", type=number(int, 1), default=64, help="clients at once")
    arg("--turns", type=number(int, 1), default=3, help="turns of each")
    arg("--port", type=number(int, 1, 65535), default=8012, help="of the gateway")
    arg("--json", help="file of the results; default: runs/bench/serving.json")
    args = ap.parse_args()
    url, where = f"http://127.0.0.1:{args.port}", f"runs/bench/serving-{time.time():.0f}.jsonl"
    process = subprocess.Popen([sys.executable, "serve.py", "--model", args.model, "--dtype", "float32", "--max-tokens",
                                str(args.max_tokens), "--max-len", "200", "--port", str(args.port), "--journal", where],
                               cwd=common.ROOT)
    try:
        offline = Judge(args.model, dtype="float32", max_tokens=args.max_tokens, max_len=200)
        until_ready(url, process)
        turns, kept = {"offline": 0, "served": 0, "cohorts": 10**6}, {}

        def turn(name, run):
            def once():
                work = groups(args, turns[name])
                start = time.perf_counter()
                rewards = run(work)
                seconds = time.perf_counter() - start
                if name == "cohorts":                  # offline afterwards, outside of the time
                    expected = in_process(work)
                else:
                    expected = kept.setdefault(turns[name], rewards)
                turns[name] += 1
                return seconds, sum(a != b for x, y in zip(rewards, expected) for a, b in zip(x, y))
            return once

        def in_process(work):
            found = now(all_of([offline.agroup(question, some) for question, some in work]))
            return [[r for r, _ in some] for some, _ in found]

        runs = {"offline": turn("offline", in_process),
                "served": turn("served", lambda work: asyncio.run(served(url, work, args.clients))),
                "cohorts": turn("cohorts", lambda work: asyncio.run(cohorts(url, work, args.clients, 1 / 3)))}
        turns["served"], turns["cohorts"] = -1, -10**6           # one of each to warm up
        for name in ("served", "cohorts"):
            runs[name]()
        results = common.alternate(runs, args.turns)
    finally:
        process.terminate()
        process.wait()
    base = median(s for s, _ in results["offline"])
    rows = [{"": name, "seconds": median(s for s, _ in some), "times offline": median(s for s, _ in some) / base,
             "judgments/s": args.groups * 4 * args.n / median(s for s, _ in some), "lost": sum(x for _, x in some)}
            for name, some in results.items()]
    common.report("serving", args, rows, [f"each turn: {', '.join(f'{s:.2f}' for s, _ in some)} s ({name})"
                                          for name, some in results.items()])


if __name__ == "__main__":
    main()
