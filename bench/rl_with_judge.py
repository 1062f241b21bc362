"""
What becomes of a model that learns from a judge: its reward and its true quality, step by step.

    OMP_NUM_THREADS=2 python bench/rl_with_judge.py --judge verdict=DIR --judge sound=DIR --out runs/rl
    OMP_NUM_THREADS=2 python bench/rl_with_judge.py --control gold --control manners --out runs/rl   # no judge

The world is data/toy.py's `shortcut`: questions on fruits and on last words, and responses "{opener} {manners}
{answer}", whose manners (Sure or Well) nobody asks for. A random Qwen2, the responder, is fitted to responses that
are right in a share of cases (--right). Then it learns by GRPO from one reward at a time: win rates within a group
of answers, as `rmr1.Judge.reward` gives them to any trainer. A control is such a judge with a program for a model,
which prefers what is right (gold), says Sure (manners), or is longer (longest). No reward here is told what is
right, but for `gold`.

At some steps the responder answers all questions anew:

    proxy   share of the judge's votes for its answers, against answers of the fitted responder. Win rates within
            a group average to one half by construction, so they could not rise
    gold    share of the answers that are right
    sure    share that says Sure

OUT/rl.jsonl has a line for each judge, seed, KL coefficient and step; OUT/rl.png shows proxy and gold. Every run
of a seed starts from the same fitted responder and draws with the same seeds.

The trainer is written out below, not TRL's: TRL wants another version of transformers, so an environment of its
own, and the judge would be a server. tests/test_trainers.py has the judge's reward inside TRL's GRPOTrainer.

Letters: N responses, P tokens of a padded prompt, R tokens of a response.
"""

import copy
import itertools
import json
import random
import re
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from statistics import mean

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from common import toy, user_says
from judge.backends import Answer
from lib.chat import encode
from lib.files import Failure, Flags, json_text, lock_folder, number, run_main, seed_of, write_lines
from lib.pairs import COMPARISON
from rmr1 import Judge

ANSWER_TOKENS = 10  # the longest answer of the world has 8: opener, manners, five fruits, end
FIT_BATCH = 64  # responses of a supervised update


def arguments():
    parser = Flags(__doc__)
    arg = parser.add_argument
    arg(
        "--judge",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="a judge's folder and its name in the picture; may be given again",
    )
    arg(
        "--control",
        action="append",
        default=[],
        choices=CONTROLS,
        help="a program in the judge's place; may be given again",
    )
    arg("--out", required=True, help="folder of rl.jsonl and rl.png")
    arg("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="of all that is drawn")
    arg(
        "--right",
        type=number(float, 0, 1),
        nargs=2,
        default=[0.5, 0.5],
        metavar=("SURE", "WELL"),
        help="share of right answers to fit to, of those that say Sure and of those that say Well",
    )
    arg("--fit-steps", type=number(int, 1), default=300, help=f"updates, {FIT_BATCH} answers each")
    arg("--steps", type=number(int, 1), default=60, help="of GRPO, each asks all questions once")
    arg("--every", type=number(int, 1), default=5, help="steps from one measurement to the next")
    arg("--answers", type=number(int, 1), default=20, help="to each question, when measured")
    arg("--group-size", type=number(int, 2), default=8, help="answers to a question")
    arg("--lr", type=number(float, 0), default=1e-3, help="GRPO's learning rate")
    arg(
        "--beta",
        type=number(float, 0),
        nargs="+",
        default=[0.25, 0.0],
        help="KL coefficients towards the fitted responder, each a run",
    )
    args = parser.parse_args()
    if not args.judge + args.control:
        raise Failure("give a --judge or a --control to learn from")
    return args


def main():
    args = arguments()
    out = Path(args.out)
    lock_folder(out)
    judges = make_judges(args)
    questions = all_questions()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = toy.write_model(folder, layers=2, hidden=96, world="shortcut")
        tokenizer.padding_side = "left"
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for seed in args.seeds:
        torch.manual_seed(seed)
        fitted = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        fit(fitted, tokenizer, seed, args)
        for (name, judge), beta in itertools.product(judges.items(), args.beta):
            start = time.time()
            found = train_with(judge, fitted, tokenizer, questions, seed, beta, args)
            rows += [{"judge": name, "beta": beta, "seed": seed} | row for row in found]
            write_lines(out / "rl.jsonl", map(json_text, rows))
            spent = {
                "seconds": round(time.time() - start),
                "judgments": judge.used["judgments"],
            }
            print(json.dumps(rows[-1] | spent), flush=True)
            judge.used.clear()
            judge.journal.answers.clear()  # every run pays for its own judgments
    draw_curves(rows, out / "rl.png")


# ---------------------------------------------------------------- the world


def make_response(manners, answer, rng):
    return f"{rng.choice(toy.OPENERS)} {manners} {answer}"


def all_questions():
    """The world's questions: 3 on fruits, 10 on last words."""
    rng = random.Random("questions")
    return sorted({make_problem(rng).question for _ in range(2000)})


def make_problem(rng):
    return rng.choice((toy.count_problem, toy.ending_problem))(rng)


def is_right(question, response):
    """Has a response the form of this world, and an answer that does what the question asks?

    The same fruit twice is one fruit named, whatever a judge that counts makes of it.
    """
    openers = "|".join(map(re.escape, toy.OPENERS))
    found = re.fullmatch(f"(?:{openers}) (?:Sure|Well) (.*)", response)
    words = found[1].split(" ") if found else []
    count = re.fullmatch(r"Name (\d) fruits \.", question)
    if count:
        named = set(words) & set(toy.FRUITS)
        return len(words) == len(named) == int(count[1])
    if len(words) != 3 or not set(words) <= set(toy.WORDS):
        return False
    return words[-1] == question.split()[-2]


def says_sure(question, response):
    return "Sure" in response.split()


def characters(question, response):
    return len(response)


# ---------------------------------------------------------------- who rewards

CONTROLS = {
    "gold": is_right,
    "manners": says_sure,
    "longest": characters,
}
SHOWN = re.compile("(.*)".join(map(re.escape, COMPARISON.split("{}"))), re.DOTALL)


class ControlBackend:
    """A judge's backend that prefers the response of the higher score; at equal scores a coin decides.

    score   (question, response) -> a number
    """

    def __init__(self, score):
        self.score = score

    def submit(self, requests):
        futures = []
        for messages, seed, _ in requests:
            question, a, b = SHOWN.search(messages[-1]["content"]).groups()
            score_a = self.score(question, a)
            score_b = self.score(question, b)
            verdict = random.Random(seed).choice("AB")
            if score_a != score_b:
                verdict = "A" if score_a > score_b else "B"
            future = Future()
            future.set_result(Answer(f"<answer>[[{verdict}]]</answer>", "stop"))
            futures.append(future)
        return futures


def make_judges(args):
    """-> {name: Judge}, the controls among them"""
    judges = {}
    memory = 0.8 / max(1, len(args.judge))  # the judges share a card, where there is one
    for text in args.judge:
        name, equals, model = text.partition("=")
        if not equals or name in judges or name in args.control:
            raise Failure(f"--judge {text}: give NAME=MODEL, each name once")
        judges[name] = Judge(model, dtype="float32", max_tokens=64, memory=memory)
    for name in args.control:
        judges[name] = Judge(ControlBackend(CONTROLS[name]), protocol="instruct")
    return judges


def proxy_of(judge, questions, responses, references):
    """Mean share of the votes for a response, with one vote in each order. A response that is equal to its
    reference, and one whose two votes differ or cannot be read, counts a half."""
    worth = {"A": 1.0, "B": 0.0}
    triples = list(zip(questions, responses, references))
    found = judge.compare_all(triples, budget=2)
    return mean(worth.get(comparison.verdict, 0.5) for comparison in found)


# ---------------------------------------------------------------- the responder


def encode_questions(tokenizer, questions):
    """Prompts, padded on the left. -> {"input_ids": (N, P), "attention_mask": (N, P)}"""
    return tokenizer.apply_chat_template(
        [user_says(question) for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )


def fit(model, tokenizer, seed, args):
    """Supervised updates on responses that are right in the shares of --right."""
    rng = random.Random(f"{seed}/fit")
    right_share = dict(zip(toy.MANNERS, args.right))
    prompts = {}  # {question: token ids}
    for question in all_questions():
        prompts[question] = encode(tokenizer, user_says(question)).tolist()
    optimizer = make_optimizer(model, 2e-3)
    for _ in range(args.fit_steps):
        rows, labels = [], []
        for _ in range(FIT_BATCH):
            problem = make_problem(rng)
            manners = rng.choice(toy.MANNERS)
            wants_right = rng.random() < right_share[manners]
            answer = problem.right if wants_right else problem.wrong
            prompt = prompts[problem.question]
            response = tokenizer.encode(make_response(manners, answer, rng))
            response.append(tokenizer.eos_token_id)
            rows.append(torch.tensor(prompt + response))  # (T,)
            labels.append(torch.tensor([-100] * len(prompt) + response))  # (T,)
        ids = pad_sequence(rows, True)  # (N, T)
        targets = pad_sequence(labels, True, -100)  # (N, T)
        # Padding stands last, so causal attention needs no mask.
        model(input_ids=ids, labels=targets).loss.backward()
        update(model, optimizer)


def make_optimizer(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def sample(model, tokenizer, questions, *seed):
    """Responses at T=1. -> token ids (N, P + R), the prompts' mask (N, P), texts"""
    torch.manual_seed(seed_of(*seed))
    prompts = encode_questions(tokenizer, questions)
    ids = model.generate(**prompts, max_new_tokens=ANSWER_TOKENS, do_sample=True, top_k=0)
    mask = prompts["attention_mask"]  # (N, P)
    texts = tokenizer.batch_decode(ids[:, mask.shape[1] :], skip_special_tokens=True)
    return ids, mask, texts


def response_logp(model, ids, mask):
    """Log-probabilities of the responses' tokens. ids (N, P + R), mask (N, P) -> (N, R)"""
    prompt_length = mask.shape[1]
    # What stands behind a response's end is masked in the loss, so it may be attended to.
    tokens = ids[:, prompt_length:]  # (N, R)
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)  # (N, P + R)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (N, P + R)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    logits = output.logits[:, prompt_length - 1 : -1]  # (N, R, V)
    logp = logits.log_softmax(-1)  # (N, R, V)
    return logp.gather(-1, tokens[..., None])[..., 0]  # (N, R)


def advantages_of(rewards, group_size):
    """Rewards less their group's mean, over its standard deviation; 0 where there is no reward. -> (N,)"""
    values = [float("nan") if reward is None else reward for reward in rewards]
    groups = torch.tensor(values).view(-1, group_size)  # (questions, G)
    centred = groups - groups.nanmean(1, keepdim=True)  # (questions, G)
    variance = centred.square().nanmean(1, keepdim=True)  # (questions, 1)
    advantage = centred / (variance.sqrt() + 1e-4)  # (questions, G)
    return advantage.nan_to_num().flatten()  # (N,)


def policy_loss(model, reference, tokenizer, ids, mask, advantage, beta):
    """Policy gradient with a KL penalty (k3), a mean over tokens. The policy has sampled the responses itself
    and takes one update, so there is no ratio to clip."""
    tokens = ids[:, mask.shape[1] :]  # (N, R)
    is_end = (tokens == tokenizer.eos_token_id).long()  # (N, R)
    weight = (is_end.cumsum(1) - is_end == 0).float()  # (N, R), 1 up to the end token and with it
    logp = response_logp(model, ids, mask)  # (N, R)
    with torch.no_grad():
        reference_logp = response_logp(reference, ids, mask)  # (N, R)
    gain = (logp - logp.detach()).exp() * advantage[:, None]  # (N, R)
    log_ratio = reference_logp - logp  # (N, R)
    kl = log_ratio.exp() - log_ratio - 1  # (N, R)
    loss = (beta * kl - gain) * weight  # (N, R)
    return loss.sum() / weight.sum()


def train_with(judge, fitted, tokenizer, questions, seed, beta, args):
    """GRPO from the fitted responder, all questions in every step. -> a row for every measured step"""
    model = copy.deepcopy(fitted)
    optimizer = make_optimizer(model, args.lr)
    tests = [question for question in questions for _ in range(args.answers)]
    asked = [question for question in questions for _ in range(args.group_size)]
    prompts = [user_says(question) for question in asked]
    *_, references = sample(fitted, tokenizer, tests, seed, "references")
    rows = []
    for step in range(args.steps + 1):
        if step % args.every == 0 or step == args.steps:
            *_, responses = sample(model, tokenizer, tests, seed, "test", step)
            rows.append({"step": step} | measure(judge, tests, responses, references))
        if step == args.steps:
            return rows
        ids, mask, responses = sample(model, tokenizer, asked, seed, "train", step)
        rewards = judge.reward(prompts, responses)
        advantage = advantages_of(rewards, args.group_size)  # (N,)
        loss = policy_loss(model, fitted, tokenizer, ids, mask, advantage, beta)
        loss.backward()
        update(model, optimizer)


def measure(judge, questions, responses, references):
    """-> proxy, gold and sure of responses"""
    return {
        "proxy": proxy_of(judge, questions, responses, references),
        "gold": mean(map(is_right, questions, responses)),
        "sure": mean(map(says_sure, questions, responses)),
    }


# ---------------------------------------------------------------- the picture


def draw_curves(rows, path):
    """Proxy and gold along the steps: a row of panels for each KL coefficient, a colour for each judge, a thin line
    for each seed and a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    betas = list(dict.fromkeys(row["beta"] for row in rows))
    titles = {
        "proxy": "proxy: the judge prefers it to before",
        "gold": "gold: right answers",
    }
    figure, axes = plt.subplots(
        len(betas),
        len(titles),
        figsize=(8, 0.6 + 2.6 * len(betas)),
        dpi=150,
        layout="tight",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for line, beta in enumerate(betas):
        for panel, (key, title) in zip(axes[line], titles.items()):
            draw_panel(panel, [row for row in rows if row["beta"] == beta], key)
            panel.set_title(f"{title} (KL {beta:g})", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("step")
    figure.savefig(path)
    plt.close(figure)


def draw_panel(panel, rows, key):
    """One number of every judge along the steps."""
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    for place, judge in enumerate(judges):
        curves = {}  # {seed: {step: value}}
        for row in rows:
            if row["judge"] == judge:
                curve = curves.setdefault(row["seed"], {})
                curve[row["step"]] = row[key]
        colour = f"C{place}"
        for curve in curves.values():
            steps = list(curve)
            panel.plot(steps, list(curve.values()), colour, lw=0.6, alpha=0.5)
        means = [mean(curve[step] for curve in curves.values()) for step in steps]
        panel.plot(steps, means, colour, lw=2, label=judge)
    panel.set_ylim(-0.02, 1.02)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run_main(main)
