"""
What a reward model is for: a tiny responder learns from the judge's rewards, in TRL's GRPOTrainer.

The demo's judge answers from vLLM's own server (the project's environment), the responder learns in TRL's:

    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 .venv/bin/python -m vllm.entrypoints.openai.api_server \\
        --model runs/demo/grpo/model --port 8011 --dtype float32 --max-model-len 256 --enforce-eager \\
        --no-enable-chunked-prefill &
    python -m venv trl && trl/bin/pip install torch==2.13.0 trl datasets aiohttp
    trl/bin/python bench/rl_with_judge.py --url http://127.0.0.1:8011/v1

First the judge compares pairs whose better response is known. Then a random Qwen2 is fitted to sums and
products, wrong more often than right, and learns on from each of two rewards: the judge's (win rates within a
group), and `longest`, the number of characters. Neither reward knows a right answer. Each line of the output
has the share of right answers to 500 questions, `held` being those that GRPO does not train on. The KL penalty
towards the fitted model (--beta) is needed: the judge falls for some far-off numbers (docs/judge.md).
"""

import itertools
import json
import random
import tempfile
import time

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer
from trl_peer import plain  # which also finds the others

import toy
from lib.files import Flags, number
from rmr1 import Judge

ANSWER_TOKENS = 8  # right answers have three: opener, number, end
RIGHT_SHARE = 0.4  # of the answers to fit to
PROMPTS = 16  # of a step of GRPO
GROUP_SIZE = 4


def sum_pairs(seed, count, excluded=()):
    """Pairs of sums and products, without those whose keys ("3 + 4 = 7") are excluded."""
    pairs = []
    for index in itertools.count():
        pair = toy.make_pair(seed, "rl_with_judge", index)
        if pair.meta["kind"] in ("add", "mul") and pair.meta["key"] not in excluded:
            pairs.append(pair)
        if len(pairs) == count:
            return pairs


def fit(model, tokenizer, pairs, args):
    """Train on the right response of a pair in RIGHT_SHARE of all cases, else on the wrong one."""
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(args.fit_steps):
        rows, labels = [], []
        for pair in pairs[64 * step : 64 * step + 64]:
            prompt = tokenizer.apply_chat_template(
                pair.context, add_generation_prompt=True, return_dict=False
            )
            wants_right = rng.random() < RIGHT_SHARE
            response = pair.a if (pair.label == "A") == wants_right else pair.b
            tokens = tokenizer.encode(response) + [tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + tokens))  # (T,)
            labels.append(torch.tensor([-100] * len(prompt) + tokens))  # (T,)
        ids = pad_sequence(rows, True)  # (B, T)
        targets = pad_sequence(labels, True, -100)  # (B, T)
        # Padding stands last, so causal attention needs no mask.
        model(input_ids=ids, labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def right_shares(model, tokenizer, pairs, held, **sampling):
    """Shares of right answers to the pairs' questions, and the characters of an answer."""
    torch.manual_seed(0)
    rows = tokenizer.apply_chat_template(
        [pair.context for pair in pairs],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    prompt_length = rows["input_ids"].shape[1]
    ids = model.generate(**rows, max_new_tokens=ANSWER_TOKENS, **sampling)  # (B, T)
    texts = tokenizer.batch_decode(ids[:, prompt_length:], skip_special_tokens=True)
    right = []
    for pair, text in zip(pairs, texts):
        answer = pair.meta["key"].split()[-1]
        right.append(text in [f"{opener} {answer}" for opener in toy.OPENERS])
    characters = sum(map(len, texts)) / len(texts)
    return shares_by_use(pairs, right, held) | {"characters": round(characters, 1)}


def shares_by_use(pairs, right, held):
    """Share of right ones among the pairs whose questions GRPO trains on, and among the held-out ones."""
    shares = {}
    for name, is_held in (("trained", False), ("held", True)):
        outcomes = [ok for pair, ok in zip(pairs, right) if (pair.meta["key"] in held) == is_held]
        shares[name] = round(sum(outcomes) / len(outcomes), 3)
    return shares


def train_with(reward, folder, tokenizer, pairs, args):
    """GRPO. The completions of a step, all groups whole, are one call of the reward function."""
    settings = plain(f"{folder}/rl", args.steps, args.lr, args.seed) | {"logging_steps": 10}
    config = GRPOConfig(
        **settings,
        beta=args.beta,
        temperature=1.0,
        max_completion_length=ANSWER_TOKENS,
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=PROMPTS * GROUP_SIZE,
        steps_per_generation=1,
    )
    trainer = GRPOTrainer(
        model=folder,
        args=config,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": [pair.context for pair in pairs]}),
    )
    trainer.train()
    return trainer.model


def longest(completions, **_):
    return [float(len(completion[-1]["content"])) for completion in completions]


def main(args, folder):
    judge = Judge(args.judge, base_url=args.url, max_tokens=56)
    test = sum_pairs("test", 500)
    held = random.Random(0).sample(sorted({pair.meta["key"] for pair in test}), 24)
    comparisons = judge.compare_all(test, budget=2)
    agrees = [c.verdict == pair.label for pair, c in zip(test, comparisons)]
    print("judge", json.dumps(shares_by_use(test, agrees, held)), flush=True)

    tokenizer = toy.write_model(folder, layers=2, hidden=96)
    tokenizer.padding_side = "left"
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    fit(model, tokenizer, sum_pairs(f"{args.seed}/fit", 64 * args.fit_steps), args)
    model.save_pretrained(folder)

    train = sum_pairs(f"{args.seed}/rl", PROMPTS * args.steps, held)
    for name, reward in (("fitted", None), ("judge", judge.reward), ("longest", longest)):
        start = time.time()
        judgments_before = len(judge.journal.answers)
        if reward:
            model = train_with(reward, folder, tokenizer, train, args)
        row = {
            "seconds": round(time.time() - start),
            "judgments": len(judge.journal.answers) - judgments_before,
            "sampled": right_shares(model, tokenizer, test, held, do_sample=True, top_k=0),
            "greedy": right_shares(model, tokenizer, test, held, do_sample=False),
        }
        print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--url", required=True, help="the judge's server")
    arg("--judge", default="runs/demo/grpo/model", help="its folder, for its prompts")
    arg("--fit-steps", type=number(int, 1), default=600, help="supervised updates, 64 answers each")
    arg("--steps", type=number(int, 1), default=160, help="of GRPO")
    arg("--lr", type=number(float, 0), default=4e-4, help="GRPO's learning rate")
    arg(
        "--beta",
        type=number(float, 0),
        default=0.25,
        help="KL coefficient, towards the fitted model",
    )
    arg("--seed", type=number(int, 0), default=0, help="of all but the 500 questions")
    args = ap.parse_args()
    torch.set_num_threads(1)  # the other core is the judge's
    set_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        main(args, folder)
