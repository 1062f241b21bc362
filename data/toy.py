"""
A world small enough to learn on two CPU cores, and its two-pass oracle.

    python data/toy.py --out runs/demo/data        # pairs, oracle traces, a tokenizer, a model configuration
    python data/toy.py --show                      # RM-R1's idea in three printed examples

RM-R1's premise in miniature. A judge may write a judgment that *looks* (it compares styles) or one that
*thinks* (it solves the problem, or writes the criterion down, and checks). The first-pass oracle mostly
looks; the second pass repairs some of the wrong judgments; right judgments for the wrong reason stay in, as
they do whenever traces are filtered by their verdict. SFT learns both habits. GRPO is paid for right verdicts
only, and drops the one that does not pay.

Reasoning pairs have one right answer (sums, products, the largest of three numbers); chat pairs have an
instruction that can be checked (how many fruits, which last word). Each response has one of three styles
(plain, detailed, bold) that says nothing about its being right.
"""
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distill import Journal, distill
from askers import Answer
from engine import seed_of
from files import Flags, claim, fail, number, write_lines
from rubrics import PROTOCOLS, Pair, chat_messages, judges_by_looks, lm_as_judge, parse

SYSTEM = "Judge A and B."
FRUITS = "apple pear plum fig lime melon peach grape mango cherry".split()
WORDS = "lamp river stone cloud chair bird ship road tree clock".split()
STYLES = ("plain", "detailed", "bold")
OPENERS = ("Here:", "In detail, step by step:", "**Great question!** Truly:")
LAZY = 0.8                   # how often the first pass looks instead of thinking
LEAP = 0.6                   # the world `leap`: how often it writes a chain's result at once


# ---------------------------------------------------------------- pairs

def chain(rng):
    """A sum of six small numbers, whose results on the way a thinker writes down. -> as `task`"""
    total = rng.randint(1, 9)
    question = steps = str(total)
    for _ in range(5):
        d = rng.randint(1, 3)
        sign = rng.choice([s for s in (1, -1) if 0 <= total + s * d <= 12])
        total += sign * d
        term = f" {'+' if sign > 0 else '-'} {d}"
        question, steps = question + term, f"{steps}{term} = {total}"
    wrong = total + rng.choice([d for d in (1, -1, 2, -2) if total + d >= 0])
    return "chain", f"What is {question} ?", str(total), str(wrong), steps


def task(rng, world="looks"):
    """One question. -> kind, question, right answer, near-miss, how a thinker gets there"""
    kind = rng.choice(["add", "mul", "max", "count", "endw"] if world == "looks" else
                      ["chain"] * 8 + ["count", "endw"])
    if kind == "chain":
        return chain(rng)
    if kind in ("add", "mul"):
        x, y = rng.randint(2, 7), rng.randint(2, 7)
        sign, right, near = ("+", x + y, [1, 2]) if kind == "add" else ("*", x * y, [1, 2, x, y])
        wrong = right + rng.choice([d * s for d in near for s in (1, -1) if right + d * s > 0])
        return kind, f"What is {x} {sign} {y} ?", str(right), str(wrong), f"{x} {sign} {y} = {right}"
    if kind == "max":
        numbers = rng.sample(range(10, 50), 3)
        right = max(numbers)
        listed = " ".join(map(str, numbers))
        return (kind, f"Which is the largest of {listed} ?", str(right),
                str(rng.choice([n for n in numbers if n != right])), f"largest of {listed} = {right}")
    if kind == "count":
        n = rng.randint(2, 4)
        wrong = rng.choice([m for m in (n - 1, n + 1) if m >= 1])
        fruits = rng.sample(FRUITS, n + wrong)
        return kind, f"Name {n} fruits .", " ".join(fruits[:n]), " ".join(fruits[n:]), str(n)
    first, second, last, wrong = rng.sample(WORDS, 4)
    return (kind, f"Write three words , the last one {last} .", f"{first} {second} {last}",
            f"{second} {last} {wrong}" if rng.random() < 0.5 else f"{first} {second} {wrong}", last)


def make_pair(seed, split, index, style=None, world="looks"):
    """The pair number `index` of a split, both in `style` if there is one: a function of its arguments."""
    rng = random.Random(f"{seed}/{split}/{index}")
    kind, question, right, wrong, key = task(rng, world)
    label, styles = rng.choice("AB"), [rng.randrange(3), rng.randrange(3)]
    styles = styles if style is None else [style, style]
    answers = [right, wrong] if label == "A" else [wrong, right]
    openers = [OPENERS[s] for s in styles]
    a, b = (f"{opener} {answer}" for opener, answer in zip(openers, answers))
    meta = {"kind": kind, "style_a": styles[0], "style_b": styles[1], "answer_a": answers[0],
            "answer_b": answers[1], "opener_a": openers[0], "opener_b": openers[1], "key": key}
    return Pair(f"{split}-{index}", [{"role": "user", "content": question}], a, b, label, "toy",
                "chat" if kind in ("count", "endw") else "reasoning", meta=meta)


# ---------------------------------------------------------------- the oracle

def think(pair):
    """A judgment that solves, or writes the criterion down, and checks. Every quote is word for word."""
    kind, key, a, b = (pair.meta[k] for k in ("kind", "key", "answer_a", "answer_b"))
    target, last = key.split()[-1], lambda s: s.split()[-1]
    quote, value = (str, lambda s: len(s.split())) if kind == "count" else (last, last)
    if pair.type == "reasoning":
        head = f"<type>Reasoning</type>\n<solution> {key}</solution>"
    else:
        criterion, noun = ("Count", "fruits") if kind == "count" else ("Ending", "last")
        head = (f"<type>Chat</type>\n<rubric>{criterion} 90%: {target} {noun}\nTone 10%: kind\n"
                f"<justify>The client asks for {target}</justify></rubric>")
    return (f"{head}\n<eval><quote_A> {quote(a)}</quote_A> {value(a)} is A and "
            f"<quote_B> {quote(b)}</quote_B> {value(b)} is B so {target} is {pair.label}</eval>\n"
            f"<answer>[[{pair.label}]]</answer>")


def look(pair, coin):
    """A judgment by looks, whatever the task: the showier response wins, at equal styles the coin decides."""
    m = pair.meta
    style_a, style_b = STYLES[m["style_a"]], STYLES[m["style_b"]]
    verdict = coin if style_a == style_b else "A" if m["style_a"] > m["style_b"] else "B"
    return (f"<type>Chat</type>\n<rubric>Style 100%: polish\n<justify>Looks win</justify></rubric>\n"
            f"<eval><quote_A>{m['opener_a']}</quote_A> {style_a} is A and "
            f"<quote_B>{m['opener_b']}</quote_B> {style_b} is B so "
            f"{style_a if verdict == 'A' else style_b} is {verdict}</eval>\n<answer>[[{verdict}]]</answer>")


def asked(trace, protocol):
    """A trace where less is asked for: no type, and a solution becomes a criterion; or nothing before the
    comparison. The verdict alone is sft.py's. No new words: a larger vocabulary would be another model."""
    if protocol == "rubrics":
        trace = re.sub(r"<solution>(.* (\d+))</solution>", r"<rubric>Ending 90%:\1 last\nTone 10%: kind\n"
                       r"<justify>The client asks for \2</justify></rubric>", trace)
        return re.sub("<type>.*</type>\n", "", trace)
    return trace[trace.index("<eval>"):] if protocol == "plain" else trace


def draft(pair, rng, world):
    """What the first pass writes: lazy in the world `looks`; in `leap`, where it never is, mostly right away."""
    if world == "looks":
        return look(pair, rng.choice("AB")) if rng.random() < LAZY else think(pair)
    if pair.type == "reasoning" and rng.random() < LEAP:            # 7 + 3 = 10 - 2 = 8: 7 + 3 - 2 = 8
        key = re.sub(r" = \d+", "", pair.meta["key"]) + re.search(r" = \d+$", pair.meta["key"])[0]
        pair = replace(pair, meta={**pair.meta, "key": key})
    return think(pair)


def oracle(pairs, seed, repair, world="looks"):
    """The traces of `pairs`, by data/distill.py's two passes with programs for teachers. The first has not
    been told the label and is lazy; the second, which has, thinks with probability `repair` and else repeats
    what it was shown. Unlike distill.py's user, who drops what failed twice, SFT gets it here."""
    drafts, repairs = {}, {}
    for p in pairs:
        rng = random.Random(f"{seed}/oracle/{p.id}")
        drafts[p.id] = draft(p, rng, world)
        repairs[p.id] = think(p) if rng.random() < repair else drafts[p.id]

    def teacher(number, texts):
        known = {seed_of(seed, id, number, 0): text for id, text in texts.items()}
        answers = lambda requests: (                                     # a request is told by its seed
            (i, Answer(known[s], "stop")) for i, (_, s, _) in enumerate(requests))
        return f"pass {number}", lambda: SimpleNamespace(answers=answers)

    args = SimpleNamespace(system_prompt=None, samples=1, agree=0.0, seed=seed, temperature=1.0,
                           max_tokens=None, price=(0, 0))
    traces, failures, _ = distill(pairs, teacher(1, drafts), teacher(2, repairs), Journal(), args)
    return [(traces.get(p.id) or failures[p.id])[0] for p in pairs]


# ---------------------------------------------------------------- tokenizer and model

# What becomes one token, longest first: a marker with its line ends, a run of tags, a set phrase, a number, a
# word. Fewer tokens are less to compute, and " is A" right after the number that decides it leaves only one
# thing to learn: to find that number again among the quotes.
PHRASES = (SYSTEM, "What is", "Which is the largest of", "Write three words , the last one",
           "Style 100%: polish", "Tone 10%: kind", "Looks win", "The client asks for", " is A", " is B",
           *OPENERS)
PIECES = (r"\n*\[(?:Client Question|The (?:Start|End) of Chatbot [AB]'s Response)\]\n*|"
          r"(?:[ \n]?</?[a-z]+(?:_[AB])?>)+\n?|\[\[[AB]\]\]|" + "|".join(map(re.escape, PHRASES))
          + r"| ?[A-Za-z]+| ?\d+%?:?| ?[^\sA-Za-z\d]|\n| ")
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_tokenizer(folder, world="looks"):
    """A Qwen2 tokenizer of a few hundred entries: bytes, so that any text can be written, and the pieces of
    this world as added tokens. (A plain word-level tokenizer would be shorter, but `transformers` and vLLM
    make a Qwen2Tokenizer of whatever lies beside a Qwen2 model.)"""
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer
    seen = {f" {n}" for n in range(101)} | {"system\n", "user\n", "assistant\n"}
    for i in range(4000):                     # far more than it takes to meet every piece of the grammar
        pair = make_pair("vocabulary", "vocabulary", i, world=world)
        for p in (pair, pair.swapped()):
            for text in (*(m["content"] for m in chat_messages(p, system=SYSTEM)), think(p), look(p, "A")):
                seen.update(re.findall(PIECES, text))
    tokenizer = Qwen2Tokenizer(
        vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[],
        unk_token=None, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False),
                          *(AddedToken(piece, normalized=False) for piece in sorted(seen))])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(folder, layers, hidden, world="looks"):
    """Tokenizer and configuration of a tiny Qwen2; no weights: `folder/config.json` stands for random ones.
    initializer_range 0.1: at this width 0.02 learns far slower. Tied embeddings: a model that copies one word
    can then copy them all (SFT loss after 800 steps: .02, untied .07)."""
    from transformers import Qwen2Config
    tokenizer = write_tokenizer(folder, world)
    Qwen2Config(architectures=["Qwen2ForCausalLM"], vocab_size=len(tokenizer), hidden_size=hidden,
                num_hidden_layers=layers, num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32,
                intermediate_size=3 * hidden, max_position_embeddings=256, tie_word_embeddings=True,
                initializer_range=0.1, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, dtype="float32").save_pretrained(folder)
    return tokenizer


# ---------------------------------------------------------------- files

def show():
    """Three examples: the idea of the paper on one screen."""
    pairs = (make_pair(0, "show", i) for i in range(1000))
    fooled = [p for p in pairs if parse(look(p, p.label)).verdict != p.label]
    reasoning, chat = (next(p for p in fooled if p.type == kind) for kind in ("reasoning", "chat"))
    for title, pair, trace in (
            ("1. A reasoning pair, judged by thinking: solve it, then compare", reasoning, think(reasoning)),
            ("2. A chat pair, judged by thinking: write the rubric, then compare", chat, think(chat)),
            ("3. The first pair, judged by looks, as a first-pass oracle often does", reasoning,
             look(reasoning, "A"))):
        print(f"=== {title}\n\n{chat_messages(pair)[1]['content']}\n\n"
              f"--- people preferred {pair.label}; the judge writes\n"
              f"{trace}\n--- reward {lm_as_judge(trace, pair.label):+.0f}\n")


def main():
    ap = Flags(__doc__)
    arg = ap.add_argument
    arg("--out", default="runs/demo/data",
        help="folder for sft.jsonl, rl.jsonl, val.jsonl, test.jsonl, model/")
    arg("--seed", type=int, default=0, help="seed of the training pairs and of the oracle")
    arg("--test-seed", type=int, default=20261121, help="seed of the test pairs")
    arg("--sft", type=number(int, 1), default=20000, help="pairs with oracle traces")
    arg("--rl", type=number(int, 1), default=4096, help="pairs without traces, for GRPO")
    arg("--test", type=number(int, 1), default=500, help="test pairs, and as many for validation")
    arg("--repair", type=number(float, 0, 1), default=0.5,
        help="share of wrong first-pass traces that pass two repairs")
    arg("--world", choices=("looks", "leap"), default="looks",
        help="looks: an oracle that is lazy; leap: chains of sums, and one that mostly leaps to the result")
    arg("--style", type=number(int, 0, 2), help="of both responses of every training pair; default: any")
    arg("--protocol", choices=PROTOCOLS, default="instruct", help="what is asked for")
    arg("--layers", type=number(int, 1), default=4, help="layers of the tiny Qwen2")
    arg("--hidden", type=number(int, 32), default=96, help="its width, a multiple of 32")
    arg("--show", action="store_true", help="print three examples instead")
    args = ap.parse_args()
    if args.show:
        return show()
    if args.hidden % 32:
        fail(f"--hidden {args.hidden}: not a multiple of 32, the size of an attention head")
    out = Path(args.out)
    claim(out)
    # Held-out pairs: none shares its prompt (question and both responses) with training. The facts (36 sums,
    # 36 products) are shared by construction, so this is a test of judging, not of new arithmetic.
    taken, splits = set(), {}
    for split, seed, count in (("test", args.test_seed, args.test), ("val", args.test_seed, args.test),
                               ("sft", args.seed, args.sft), ("rl", args.seed, args.rl)):
        splits[split], index = [], 0
        while len(splits[split]) < count:
            style = args.style if split in ("sft", "rl") else None
            pair, index = make_pair(seed, split, index, style, args.world), index + 1
            key = pair.context[0]["content"], frozenset((pair.a, pair.b))       # in either order
            if key not in taken:
                splits[split].append(pair)
            if split in ("test", "val"):
                taken.add(key)
    traces = oracle(splits["sft"], args.seed, args.repair, args.world)
    write_lines(out / "sft.jsonl", (json.dumps(p.row(asked(t, args.protocol)))
                                    for p, t in zip(splits["sft"], traces)))
    for split in ("rl", "val", "test"):
        write_lines(out / f"{split}.jsonl", (json.dumps(p.row()) for p in splits[split]))
    tokenizer = write_model(out / "model", args.layers, args.hidden, args.world)
    form = {"protocol": args.protocol, "system": SYSTEM}
    (out / "model" / "judge.json").write_text(json.dumps(form) + "\n")
    judgments = [parse(t) for t in traces]
    wrong = sum(j.verdict != p.label for p, j in zip(splits["sft"], judgments)) / args.sft
    lazy = sum(judges_by_looks(j.rubric) for j in judgments) / args.sft
    print(f"{out}: {args.sft} traces (wrong verdict {wrong:.0%}, by looks {lazy:.0%}), {args.rl} pairs for "
          f"GRPO, {args.test} to validate, {args.test} to test; {len(tokenizer)} tokens in the vocabulary")


if __name__ == "__main__":
    main()
