"""
The judge you use: a sampling engine, and `judge` for one pair.

    python rmr1.py judge --model runs/demo/grpo/model --system-prompt runs/demo/data/system.txt \\
        --data runs/demo/data/test.jsonl --line 3
    python rmr1.py judge --model MODEL --question "What is 6 * 7?" --a "It is 42." --b "It is 45."

The engine is vLLM inside this process, on CUDA or on a CPU, alone or one in every torchrun rank. Token ids go
in, token ids and their log-probs come out; `sync` gives it a trainer's weights.
"""
import argparse
import hashlib
import os
import textwrap
import warnings
from dataclasses import dataclass

import rubrics
from rubrics import Pair, chat_messages, encode, fail, parse, read_pairs, read_system


@dataclass
class Sample:
    """One sampled text: token ids (the stop token included), the log-prob of each under the sampling
    distribution, and whether it ended by itself rather than at the length limit."""
    tokens: list
    logprobs: list
    finished: bool


class Engine:
    """vLLM, driven by token ids.

    model     a model folder or hub id
    max_len   tokens of prompt and response together
    dtype     "float32" or "bfloat16", the same as the trainer's
    weights   "auto": from the folder. "dummy": none yet, `sync` brings them, which costs a trainer nothing
              extra and makes its very first sampling a test of the sync
    memory    share of a card's memory for weights and cache. On a CPU the cache has
              VLLM_CPU_KVCACHE_SPACE GiB, 1 unless set

    Building one is a collective: `policy.start_ranks` comes first, then every rank builds it, none may skip.
    """

    def __init__(self, model, max_len, dtype="bfloat16", weights="auto", memory=0.9):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import torch
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # names torch deprecates
        import vllm
        self.torch, self.vllm, self.max_len, self.cuda = torch, vllm, max_len, torch.cuda.is_available()
        if self.cuda:
            # Level-2 sleep while the trainer works: weights and cache leave the card, and the next sync,
            # which happens anyway, brings the weights back.
            kw = dict(gpu_memory_utilization=memory, enable_sleep_mode=weights == "dummy")
        else:
            # Eager, and no compiled sampler: starts in 2 s instead of 28, and without a C++ compiler.
            # No chunked prefill: a chunked, seeded request crashes vLLM's CPU sampler, so a prompt
            # must fit into one batch.
            torch._dynamo.config.disable = True
            kw = dict(enforce_eager=True, enable_chunked_prefill=False,
                      max_num_batched_tokens=max(max_len, 8192))
        rng = torch.get_rng_state()
        self.llm = vllm.LLM(
            model=str(model), dtype=dtype, max_model_len=max_len, load_format=weights, max_num_seqs=256,
            distributed_executor_backend="external_launcher", skip_tokenizer_init=True, seed=0,
            enable_prefix_caching=True, logprobs_mode="processed_logprobs", disable_log_stats=True, **kw)
        torch.set_rng_state(rng)            # LLM() reseeds the process
        self.asleep = False

    def generate(self, prompts, seeds, max_tokens, temperature=1.0, stop=(), progress=False):
        """One sample for every prompt (a list of token ids) with its seed, at one temperature (0: greedy) or
        one for each. -> [Sample, ...] in order

        Texts are a function of (weights, prompt, seed): not of the other requests, the rank or what was
        sampled before. top_p and top_k are off, so the log-probs are those of the full
        softmax(logits / temperature). A prompt that leaves no room for a response raises ValueError before
        anything is sampled: vLLM would refuse the whole batch.
        """
        if longest := [len(p) for p in prompts if len(p) >= self.max_len]:
            raise ValueError(f"{len(longest)} prompts leave no room in a window of {self.max_len} tokens")
        temperatures = temperature if isinstance(temperature, list) else [temperature] * len(prompts)
        params = [
            self.vllm.SamplingParams(
                temperature=t, seed=seed, logprobs=0, detokenize=False, stop_token_ids=list(stop),
                max_tokens=min(max_tokens, self.max_len - len(p)))
            for p, seed, t in zip(prompts, seeds, temperatures)]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=progress)
        return [Sample(list(o.token_ids), [d[t].logprob for d, t in zip(o.logprobs, o.token_ids)],
                       o.finish_reason == "stop") for o in (r.outputs[0] for r in outputs)]

    def sleep(self):
        """Hand the card's memory to the trainer until the next sync. On a CPU there is
        nothing to hand over."""
        if self.cuda and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self, policy, dtype):
        """Take over the policy's weights: one call, tensors streamed in module order, every name of a tied
        pair. Cached prompt keys belong to the old weights and are dropped; a cache that refuses would mix the
        two, so that is an error. A collective among ranks. After a sleep, weights wake first and the cache
        only once they are in: both plus the trainer's leftovers may not fit."""
        if self.asleep:
            # What the trainer holds but does not use is what vLLM is about to take.
            self.torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=policy.weights(dtype)))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.reset_cache()

    def reset_cache(self):
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after a weight sync: "
                               "samples would mix old and new weights")


def seed_of(*key):
    """A seed for one sample: a function of what names it, e.g. (run seed, step, pair, sample)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7])


def text_of(tokenizer, prompt, sample):
    """What the judge wrote, special tokens included (the published reward reads them too). Where the
    template opened the thinking (DeepSeek's ends in `<think>`), it is put back in front, so that the parser
    sees where it ends."""
    opened = tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>")
    return ("<think>\n" if opened else "") + tokenizer.decode(sample.tokens)


# ---------------------------------------------------------------- the command line

def show(pair, judgment):
    """A judgment for a person to read: what was asked, the criteria with their weights, the
    comparison, the verdict."""
    wide = lambda text, indent="  ": "\n".join(
        textwrap.fill(line, 100, initial_indent=indent, subsequent_indent=indent)
        for line in text.strip("\n").splitlines())
    parts = [("question", "\n".join(f"{m['role']}: {m['content']}" for m in pair.context)),
             ("response A", pair.a), ("response B", pair.b), ("task", judgment.type),
             ("solution", judgment.solution),
             ("rubric", "\n".join(f"{f'{w:g} %' if w is not None else '':>6}  {name}"
                                  f"{': ' + text if text else ''}" for name, w, text in judgment.rubric)),
             ("why these", judgment.justify), ("comparison", judgment.eval)]
    for title, text in parts:
        if text.strip():
            print(f"{title}\n{wide(text)}\n")
    if not (judgment.solution or judgment.rubric or judgment.eval):
        print(f"what it wrote\n{wide(judgment.text)}\n")
    print(f"verdict: {judgment.verdict or f'none ({judgment.reason})'}"
          + (f", people preferred {pair.label}" if pair.label else ""))


def judge(args):
    """`python rmr1.py judge`: one pair, greedily, printed."""
    if args.data:
        pairs = read_pairs(args.data)
        if not 1 <= args.line <= len(pairs):
            fail(f"--line {args.line}: {args.data} has {len(pairs)} pairs")
        pair = pairs[args.line - 1]
    elif args.question and args.a and args.b:
        pair = Pair("command line", [{"role": "user", "content": args.question}], args.a, args.b, "")
    else:
        fail("name a pair: --question, --a and --b, or --data with --line")
    import policy                                  # brings torch, which reading a judgment does not need
    folder = policy.resolve(args.model)
    tokenizer, stop = policy.load_tokenizer(folder)
    prompt = encode(tokenizer, chat_messages(pair, args.protocol, read_system(args.system_prompt)))
    window = policy.window_of(folder)
    if len(prompt) >= window:
        fail(f"the prompt has {len(prompt)} tokens, which leaves no room in the model's window of {window}")
    policy.start_ranks()
    engine = Engine(folder, min(window, len(prompt) + args.max_tokens), args.dtype)
    sample, = engine.generate([prompt], [0], args.max_tokens, 0.0, stop)
    show(pair, parse(text_of(tokenizer, prompt, sample), sample.finished))


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    commands = ap.add_subparsers(required=True, metavar="judge")
    one = commands.add_parser("judge", help="judge one pair",
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arg = one.add_argument
    arg("--model", required=True, help="folder or hub id of a judge")
    arg("--question", help="the client's question")
    arg("--a", help="response A")
    arg("--b", help="response B")
    arg("--data", help="or: a file of pairs")
    arg("--line", type=int, default=1, help="which of its pairs, from 1")
    arg("--protocol", choices=rubrics.PROTOCOLS, default="instruct", help="prompt form")
    arg("--system-prompt", help="file with the system prompt, instead of ours")
    arg("--max-tokens", type=int, default=8192, help="longest judgment in tokens")
    arg("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
    one.set_defaults(run=judge)
    args = ap.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
