"""
What a reward model is for: a tiny responder learns from the judge's rewards, in TRL's GRPOTrainer.

The demo's judge answers from vLLM's own server (the project's environment), the responder learns in TRL's:

    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 .venv/bin/python -m vllm.entrypoints.openai.api_server \\
        --model runs/demo/grpo/model --port 8011 --dtype float32 --max-model-len 256 --enforce-eager \\
        --no-enable-chunked-prefill &
    python -m venv trl && trl/bin/pip install torch==2.13.0 trl datasets aiohttp
    trl/bin/python bench/rl_with_judge.py --url http://127.0.0.1:8011/v1

First the judge is asked about pairs whose better response is known. Then a random Qwen2 is fitted to sums
and products, wrong more often than right, and learns on from each reward: the judge's (a group's win rates),
and `longest`, the number of characters. Neither sees a right answer. A line each says the share of right
answers to 500 questions, `held` being those that GRPO does not ask. The pull towards the fitted model
(--beta) is needed: the judge falls for some far-off numbers (docs/judge.md).
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

from trl_peer import plain         # which also finds the others
import toy
from files import Flags, number
from rmr1 import Judge

LONG = 8                    # tokens of an answer; right ones have three: opener, number, end
RIGHT = 0.4                 # share of right answers to fit to
PROMPTS, GROUP = 16, 4      # questions of a step of GRPO, answers to each


def pairs(seed, n, apart=()):
    """n pairs of sums and products, without those whose keys ("3 + 4 = 7") are in `apart`."""
    some = (toy.make_pair(seed, "rl_with_judge", i) for i in itertools.count())
    some = (p for p in some if p.meta["kind"] in ("add", "mul") and p.meta["key"] not in apart)
    return list(itertools.islice(some, n))


def fit(model, tokenizer, some, args):
    """Supervised: the right response of a pair in RIGHT of all cases, else the wrong one."""
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(args.fit_steps):
        rows, labels = [], []
        for pair in some[64 * step:64 * step + 64]:
            ask = tokenizer.apply_chat_template(pair.context, add_generation_prompt=True, return_dict=False)
            said = pair.a if (pair.label == "A") == (rng.random() < RIGHT) else pair.b
            text = tokenizer.encode(said) + [tokenizer.eos_token_id]
            rows.append(torch.tensor(ask + text))
            labels.append(torch.tensor([-100] * len(ask) + text))
        ids, labels = pad_sequence(rows, True), pad_sequence(labels, True, -100)
        model(input_ids=ids, labels=labels).loss.backward()      # padding stands last: no mask is needed
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def shares(model, tokenizer, some, held, **how):
    """What share of the pairs' questions a model answers right; characters of an answer. how: it samples"""
    torch.manual_seed(0)
    rows = tokenizer.apply_chat_template([p.context for p in some], add_generation_prompt=True, padding=True,
                                         return_dict=True, return_tensors="pt")
    ids = model.generate(**rows, max_new_tokens=LONG, **how)
    texts = tokenizer.batch_decode(ids[:, rows["input_ids"].shape[1]:], skip_special_tokens=True)
    answers = [p.meta["key"].split()[-1] for p in some]
    right = [text in [f"{o} {answer}" for o in toy.OPENERS] for text, answer in zip(texts, answers)]
    return split(some, right, held) | {"characters": round(sum(map(len, texts)) / len(texts), 1)}


def split(some, right, held):
    """Share of right ones among the pairs whose questions GRPO asks, and among the held-out ones."""
    return {name: round(sum(x) / len(x), 3) for name, out in (("asked", False), ("held", True))
            if (x := [ok for p, ok in zip(some, right) if (p.meta["key"] in held) == out])}


def learn(folder, tokenizer, reward, some, args):
    """GRPO. A step's completions, all groups whole, are one call of the reward function."""
    config = GRPOConfig(
        **plain(f"{folder}/rl", args.steps, args.lr, args.seed) | {"logging_steps": 10}, beta=args.beta,
        temperature=1.0, max_completion_length=LONG, num_generations=GROUP,
        per_device_train_batch_size=PROMPTS * GROUP, steps_per_generation=1)
    trainer = GRPOTrainer(model=folder, args=config, processing_class=tokenizer, reward_funcs=reward,
                          train_dataset=Dataset.from_dict({"prompt": [p.context for p in some]}))
    trainer.train()
    return trainer.model


def main(args, folder):
    judge = Judge(args.judge, base_url=args.url, max_tokens=56)
    test = pairs("test", 500)
    held = random.Random(0).sample(sorted({p.meta["key"] for p in test}), 24)
    agrees = [f.verdict == p.label for p, f in zip(test, judge.compare_all(test, budget=2))]
    print("judge", json.dumps(split(test, agrees, held)), flush=True)
    tokenizer = toy.write_model(folder, layers=2, hidden=96)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    fit(model, tokenizer, pairs(f"{args.seed}/fit", 64 * args.fit_steps), args)
    model.save_pretrained(folder)
    some = pairs(f"{args.seed}/rl", PROMPTS * args.steps, held)
    longest = lambda completions, **_: [float(len(c[-1]["content"])) for c in completions]
    for name, reward in (("fitted", None), ("judge", judge.reward), ("longest", longest)):
        start, had = time.time(), len(judge.journal.answers)
        if reward:
            model = learn(folder, tokenizer, reward, some, args)
        print(name, json.dumps({"seconds": round(time.time() - start),
                                "judgments": len(judge.journal.answers) - had,
                                "sampled": shares(model, tokenizer, test, held, do_sample=True, top_k=0),
                                "greedy": shares(model, tokenizer, test, held, do_sample=False)}), flush=True)


if __name__ == "__main__":
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--url", required=True, help="the judge's server")
    arg("--judge", default="runs/demo/grpo/model", help="its folder: how to ask it")
    arg("--fit-steps", type=number(int, 1), default=600, help="supervised updates, 64 answers each")
    arg("--steps", type=number(int, 1), default=160, help="of GRPO")
    arg("--lr", type=number(float, 0), default=4e-4, help="GRPO's learning rate")
    arg("--beta", type=number(float, 0), default=0.25, help="pull towards the fitted model")
    arg("--seed", type=number(int, 0), default=0, help="of all but the 500 questions")
    args = ap.parse_args()
    torch.set_num_threads(1)                    # the other core is the judge's
    set_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        main(args, folder)
