"""
What does the gateway cost? 64 clients at once, beside the same work in one process.

    OMP_NUM_THREADS=1 python bench/serving.py                  # the demo's judge

Groups of 8 responses (bench/best_of_n.py's questions), other ones in every turn, so that no journal helps:

    served      the gateway, started for this; 64 clients post a group each to /reward, and then the next
    one by one  the same one sample at a time, as OpenRLHF sends them; a third of the callers leave while they
                wait, and ask again
    offline     Judge(model), after each of these with its groups: all together, by vLLM in this process

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
from best_of_n import candidates, questions

import common
from lib.files import Flags, number, run_main
from rmr1 import Judge, all_of, run_sync

CLIENTS = 64  # at once
GROUP_SIZE = 8
LEAVING_SHARE = 1 / 3  # of the callers


def make_groups(count, name):
    """[(question, its responses), ...]: the same questions whatever the name, with other openers."""
    rng = random.Random(name)
    triples = (questions() * count)[:count]
    return [
        (question, list(next(candidates(right, wrong, GROUP_SIZE, rng))))
        for question, right, wrong in triples
    ]


async def ask_gateway(url, work, ask):
    """Rewards of all groups, asked for by clients that take one group after the other.

    ask  `whole_group` or `one_by_one`
    """
    clients = asyncio.Semaphore(CLIENTS)
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client(index, question, responses):
            async with clients:
                return await ask(session, index, question, responses)

        return await all_of(client(index, *group) for index, group in enumerate(work))


async def whole_group(session, _, question, responses):
    """Rewards of a group in one request."""
    body = {"prompts": [question] * len(responses), "completions": responses}
    async with session.post("/reward", json=body) as response:
        return (await response.json())["rewards"]


async def one_by_one(session, index, question, responses):
    """Rewards of a group in a request for each sample, in any order. Some callers leave after a moment and
    ask again."""

    async def sample(text, leaves):
        body = {"query": [f"{question}{text}"], "prompts": [question], "labels": [""]}
        path = f"/get_reward?group={GROUP_SIZE}&group_id={index}"
        for seconds in [0.02, 600] if leaves else [600]:
            timeout = aiohttp.ClientTimeout(seconds)
            try:
                async with session.post(path, json=body, timeout=timeout) as response:
                    rewards = (await response.json())["rewards"]
                    return rewards[0] if rewards else None
            except TimeoutError:
                pass

    rng = random.Random(index)
    places = rng.sample(range(GROUP_SIZE), GROUP_SIZE)
    samples = [sample(responses[i], rng.random() < LEAVING_SHARE) for i in places]
    reward_at = dict(zip(places, await all_of(samples)))
    return [reward_at[i] for i in range(GROUP_SIZE)]


def count_lost(rewards, expected):
    """Samples that did not get the reward that the judge gives offline."""
    lost = 0
    for group_rewards, (group_expected, _) in zip(rewards, expected):
        for reward, (expected_reward, _) in zip(group_rewards, group_expected):
            lost += reward != expected_reward
    return lost


def until_ready(url, process):
    while process.poll() is None:
        try:
            return urllib.request.urlopen(url + "/health")
        except OSError:
            time.sleep(0.5)
    sys.exit("the gateway has ended")


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--model", default="runs/demo/grpo/model", help="a judge's folder")
    arg("--groups", type=number(int, 1), default=128, help="groups a turn")
    arg("--turns", type=number(int, 1), default=3, help="turns of each")
    arg("--port", type=number(int, 1, 65535), default=8012, help="of the gateway")
    args = ap.parse_args()
    url = f"http://127.0.0.1:{args.port}"
    journal = f"runs/bench/serving-{time.time():.0f}.jsonl"
    settings = {
        "--model": args.model,
        "--dtype": "float32",
        "--max-tokens": "56",
        "--max-len": "200",
        "--port": str(args.port),
        "--journal": journal,
    }
    words = [word for flag in settings.items() for word in flag]
    process = subprocess.Popen([sys.executable, "-m", "serve", *words], cwd=common.ROOT)
    times = {"offline": [], "served": [], "one by one": []}
    lost = Counter()
    try:
        judge = Judge(args.model, dtype="float32", max_tokens=56, max_len=200)
        until_ready(url, process)
        for turn in range(args.turns + 1):
            for name, ask in (("served", whole_group), ("one by one", one_by_one)):
                work = make_groups(args.groups, f"{name} {turn}")
                seconds, rewards = common.timed(run_sync, ask_gateway(url, work, ask))
                offline = all_of(judge.agroup(*group) for group in work)
                offline_seconds, expected = common.timed(run_sync, offline)
                if turn == 0:  # warms up
                    continue
                times[name].append(seconds)
                times["offline"].append(offline_seconds)
                lost[name] += count_lost(rewards, expected)
    finally:
        process.terminate()
        process.wait()
    rows = [
        {
            "": name,
            "seconds": median(seconds),
            "times offline": median(seconds) / median(times["offline"]),
            "judgments/s": args.groups * 4 * GROUP_SIZE / median(seconds),
            "lost": lost[name],
            "each turn": ", ".join(f"{x:.2f}" for x in seconds),
        }
        for name, seconds in times.items()
    ]
    common.report(rows)


if __name__ == "__main__":
    run_main(main)
