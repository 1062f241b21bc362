"""
Sampling: vLLM in this process, on CUDA or on a CPU, alone or one in every torchrun rank.

Token ids go in, token ids and their log-probs come out; `sync` gives the engine a trainer's weights.
"""
import hashlib
import itertools
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from files import fail


@dataclass
class Sample:
    """One sampled text: token ids (the stop token included), the log-prob of each under the sampling
    distribution, and whether it ended by itself rather than at the length limit."""
    tokens: list
    logprobs: list
    finished: bool


def check_tp(tp, world, config=None):
    """--tp against the ranks and the model: an engine gives each of its ranks as many attention heads."""
    if world % tp:
        fail(f"--tp {tp} does not divide the {world} ranks")
    if config and config.num_attention_heads % tp:
        fail(f"--tp {tp} does not divide the model's {config.num_attention_heads} attention heads")


def check_version(version):
    """vLLM's against those that this code was read against; older ones fail in the middle of a first step."""
    if not (0, 32) <= tuple(map(int, version.split(".")[:2])) < (0, 34):
        fail(f"vllm {version}: 0.32 and 0.33 are known to work; pip install -r requirements.txt")


def on_cpu(max_len):
    """vLLM's settings on a CPU. Eager: it starts in 2 s instead of 28, and without a C++ compiler. No chunked prefill:
    a chunked, seeded request crashes its CPU sampler, so a prompt must fit into one batch. Blocks of 32 tokens, not
    128: the samples of a prompt share whole blocks only."""
    return dict(enforce_eager=True, enable_chunked_prefill=False, block_size=32,
                max_num_batched_tokens=max(max_len, 8192))


class Engine:
    """vLLM, driven by token ids.

    model     a model folder or hub id
    max_len   tokens of prompt and response together
    dtype     "float32" or "bfloat16", the same as the trainer's. Logits are fp32 in both, as the trainer's are
    weights   "auto": from the folder. "dummy": none yet, `sync` brings them, which costs a trainer nothing
              extra and makes its very first sampling a test of the sync
    memory    share of a card's memory for weights and cache. On a CPU the cache has
              VLLM_CPU_KVCACHE_SPACE GiB, 1 unless set
    tp        tensor parallel: so many consecutive ranks are one engine, each with a part of every matrix

    Building one is a collective: `ranks.start_ranks` comes first, then every rank builds it, none may skip.
    """

    def __init__(self, model, max_len, dtype="bfloat16", weights="auto", memory=0.9, tp=1):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import torch
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # names torch deprecates
        import vllm
        check_version(vllm.__version__)
        self.torch, self.vllm, self.max_len, self.cuda = torch, vllm, max_len, torch.cuda.is_available()
        # As many as vLLM captures graphs for: a card's cache has room. Two cores gain nothing from more.
        self.at_once = 512 if self.cuda else 256
        if self.cuda:
            # Level-2 sleep while the trainer works: weights and cache leave the card, and the next sync,
            # which happens anyway, brings the weights back.
            kw = dict(gpu_memory_utilization=memory, enable_sleep_mode=weights == "dummy")
        else:
            torch._dynamo.config.disable = True              # no compiled sampler, as `on_cpu`
            kw = on_cpu(max_len)
        rng = torch.get_rng_state()
        self.llm = vllm.LLM(
            model=str(model), dtype=dtype, max_model_len=max_len, load_format=weights,
            max_num_seqs=self.at_once, distributed_executor_backend="external_launcher",
            tensor_parallel_size=tp, skip_tokenizer_init=True, seed=0,
            enable_prefix_caching=True, logprobs_mode="processed_logprobs", disable_log_stats=True,
            hf_overrides={"head_dtype": "float32"}, **kw)
        torch.set_rng_state(rng)            # LLM() reseeds the process
        if tp > 1 and not self.cuda:
            # The memory that vLLM's CPU ranks share has the same name in every run: one that is killed would
            # leave it behind, and the next could not start. All have opened it by now, so the name can go.
            for name in Path("/dev/shm").glob("*-cpushm_*"):
                name.unlink(missing_ok=True)
        self.asleep, self.tp = False, tp

    def stream(self, requests, max_tokens, stop=(), logprobs=True):
        """Sample for an iterable of (prompt ids, seed, temperature), 0 being greedy. Yields (place, Sample)
        in the order in which they finish. The iterable is read a little ahead of the sampling, so that
        whoever makes the prompts works while the card does; a None in it says that there is nothing more for now,
        and takes a place.

        Texts are a function of (weights, prompt, seed): not of the other requests, the rank or what was
        sampled before. On a card that holds for the draws, but not for the last bits of the logits, which
        depend on the batch: a text can part from its twin where two words are about as likely (vLLM's
        VLLM_BATCH_INVARIANT=1 is for who needs more, and slower). top_p and top_k are off, so the log-probs
        are those of the full softmax(logits / temperature); without `logprobs` vLLM is some percent faster. A
        prompt that leaves no room for a response raises ValueError: vLLM would refuse it. The tp ranks of one
        engine must hand in the same requests; they yield the same samples.
        """
        engine, requests, waiting = self.llm.llm_engine, enumerate(requests), set()
        try:
            while True:
                # Never fewer waiting than vLLM could take up in its next step.
                more = itertools.islice(requests, 2 * self.at_once - len(waiting))
                # Flat log-probs are a few lists a sample; the default is two objects a token, which takes
                # 2.5 times the memory and 3.6 times the time.
                for place, request in more:
                    if request is None:
                        break
                    prompt, seed, temperature = request
                    if len(prompt) >= self.max_len:
                        raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in a window of "
                                         f"{self.max_len}")
                    engine.add_request(str(place), {"prompt_token_ids": prompt}, self.vllm.SamplingParams(
                        temperature=temperature, seed=seed, logprobs=0 if logprobs else None,
                        flat_logprobs=True, detokenize=False, stop_token_ids=list(stop),
                        max_tokens=min(max_tokens, self.max_len - len(prompt)),
                        output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY))
                    waiting.add(str(place))
                if not waiting:
                    return
                for done in engine.step():
                    o = done.outputs[0]
                    waiting.remove(done.request_id)
                    yield int(done.request_id), Sample(
                        list(o.token_ids), o.logprobs.logprobs if o.logprobs else [],
                        o.finish_reason == "stop")
        finally:
            engine.abort_request(list(waiting))        # if whoever listened has left, so do the requests

    def generate(self, prompts, seeds, max_tokens, temperature=1.0, stop=()):
        """One sample for every prompt with its seed, all at one temperature. -> [Sample, ...] in order. A
        prompt that leaves no room raises ValueError before anything is sampled. With tensor parallelism every
        rank brings its own prompts: all of an engine's ranks sample them all, and each keeps its own."""
        if longest := [len(p) for p in prompts if len(p) >= self.max_len]:
            raise ValueError(f"{len(longest)} prompts leave no room in a window of {self.max_len} tokens")
        asked, start = list(zip(prompts, seeds)), 0
        if self.tp > 1:
            from ranks import all_gather
            from vllm.distributed import get_tp_group
            group = get_tp_group()
            everyone = all_gather(asked, group.cpu_group)
            asked, start = sum(everyone, []), sum(len(a) for a in everyone[:group.rank_in_group])
        samples = dict(self.stream(((p, s, temperature) for p, s in asked), max_tokens, stop))
        return [samples[start + i] for i in range(len(prompts))]

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
        only once they are in: both plus the trainer's leftovers may not fit.

        Weights that break off midway leave layers half-loaded: they are all sent once more, and if they break
        off again, or vLLM itself fails, an error is raised before anyone can sample."""
        from ranks import all_max
        if self.asleep:
            # What the trainer holds but does not use is what vLLM is about to take.
            self.torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        for attempt in (1, 2):
            broken = []

            def weights():                  # ends early rather than raising, so that vLLM can begin anew
                try:
                    yield from policy.weights(dtype)
                except Exception as e:
                    print(f"sync, attempt {attempt}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
                    broken.append(e)

            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights()))
            if not all_max([len(broken)])[0]:
                break
        else:
            raise RuntimeError("the weights broke off twice on their way to the engine")
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.reset_cache()

    def reset_cache(self):
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after a weight sync: "
                               "samples would mix old and new weights")


def check_gap(logprobs, bound):
    """Mean and largest |trainer - engine| log-prob of what was sampled, over all ranks, from [(trainer's (R,),
    engine's (R,)), ...] of this one. They are two programs with the same weights: where they disagree, samples
    came from other weights than those that learn from them. A mean above the bound ends the run."""
    from ranks import all_max, all_sum
    gaps = [(ours - theirs).abs() for ours, theirs in logprobs]
    total, count = all_sum([sum(gap.sum() for gap in gaps), sum(map(len, gaps))])
    worst, = all_max([max((gap.max() for gap in gaps), default=0)])
    mean = total / count
    if not mean <= bound:
        fail(f"engine and trainer disagree on the sampled tokens: mean log-prob gap {mean:.3g}, "
             f"bound {bound:g} (--max-gap). The engine is not sampling from the weights in training: "
             "the weight sync is broken, its cache is stale, or the two compute differently (dtype, "
             "temperature, template)")
    return {"gap_mean": mean, "gap_max": worst}


def seed_of(*key):
    """A seed for one sample: a function of what names it, e.g. (run seed, step, pair, sample)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7])


def text_of(tokenizer, prompt, sample):
    """What the judge wrote, special tokens included (the published reward reads them too). Where the
    template opened the thinking (DeepSeek's ends in `<think>`), it is put back in front, so that the parser
    sees where it ends."""
    opened = tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>")
    return ("<think>\n" if opened else "") + tokenizer.decode(sample.tokens)
