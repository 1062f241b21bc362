"""
Sampling: vLLM in this process, on CUDA or on a CPU, alone or one in every torchrun rank.

Token ids go in, token ids and their log-probs come out; `sync` gives the engine a trainer's
weights. Training asks three things of an engine: `generate`, `sleep` and `sync`. Another sampler is
a class with these three, put in place of `grpo.Engine`.

Letters: R tokens of a sample or a micro-batch.
"""

import itertools
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.dist import all_gather, all_max, all_sum
from lib.files import Failure


@dataclass
class Sample:
    """One sampled text.

    tokens    (R,)  int32, the stop token included
    logprobs  (R,)  float32, of each token under the sampling distribution; empty where they were not wanted
    finished        ended by itself, rather than at the length limit
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool


def check_tp(tp, world, config=None):
    """Raise Failure where --tp does not fit the ranks or the model.

    An engine gives each of its ranks as many attention heads.
    """
    if world % tp:
        raise Failure(f"--tp {tp} does not divide the {world} ranks")
    if config and config.num_attention_heads % tp:
        raise Failure(
            f"--tp {tp} does not divide the model's {config.num_attention_heads} attention heads"
        )


def check_version(version):
    """Raise Failure for a vLLM that this code was not read against.

    It would fail in the middle of a step.
    """
    release = re.match(r"(\d+)\.(\d+)", version)  # of 0.33rc1 too
    if not release or release.groups() not in (("0", "32"), ("0", "33")):
        raise Failure(
            f"vllm {version}: 0.32 and 0.33 are known to work; pip install -r requirements.txt"
        )


# Samples that decode at the same time. A card: as many as vLLM captures graphs for, since its cache has room.
# Two cores gain nothing from more.
AT_ONCE, AT_ONCE_ON_CPU = 512, 256


def on_cpu(max_len):
    """vLLM's settings on a CPU.

    Eager: it starts in 2 s instead of 28, and without a C++ compiler. No chunked prefill: a
    chunked, seeded request crashes its CPU sampler, so a prompt must fit into one batch. Blocks of
    32 tokens, not 128: the samples of a prompt share whole blocks only.
    """
    return dict(
        enforce_eager=True,
        enable_chunked_prefill=False,
        block_size=32,
        max_num_batched_tokens=max(max_len, 8192),
    )


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

    Building one is a collective: `dist.start_ranks` comes first, then every rank builds it, none
    may skip.
    """

    def __init__(self, model, max_len, dtype="bfloat16", weights="auto", memory=0.9, tp=1):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import torch

        # vLLM uses names that torch deprecates.
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        import vllm

        check_version(vllm.__version__)
        self.torch = torch
        self.vllm = vllm
        self.max_len = max_len
        self.tp = tp
        self.asleep = False
        self.cuda = torch.cuda.is_available()
        self.at_once = AT_ONCE if self.cuda else AT_ONCE_ON_CPU
        if self.cuda:
            # Level-2 sleep while the trainer works: weights and cache leave the card, and the next
            # sync, which happens anyway, brings the weights back.
            settings = dict(gpu_memory_utilization=memory, enable_sleep_mode=weights == "dummy")
        else:
            # No compiled sampler, as `on_cpu` has no compiled model. This holds for the whole
            # process.
            torch._dynamo.config.disable = True
            settings = on_cpu(max_len)

        random_state = torch.get_rng_state()
        self.llm = vllm.LLM(
            model=str(model),
            dtype=dtype,
            max_model_len=max_len,
            # By itself vLLM takes Mistral's own files, where a folder has them too.
            load_format="safetensors" if weights == "auto" else weights,
            config_format="hf",
            trust_remote_code=False,
            max_num_seqs=self.at_once,
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=tp,
            skip_tokenizer_init=True,
            seed=0,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            hf_overrides={"head_dtype": "float32"},
            **settings,
        )
        torch.set_rng_state(random_state)  # LLM() reseeds the process
        if tp > 1 and not self.cuda:
            unlink_shared_memory()

    def stream(self, requests, max_tokens, stop=(), logprobs=True):
        """Sample for an iterable of requests, and yield (place, `Sample`) as they finish.

        requests    (prompt ids, seed, temperature) each; temperature 0 is greedy. The iterable is read a little
                    ahead of the sampling, so that whoever makes the prompts works while the card
                    does. A None in it says that there is nothing more for now, and takes a place.
        max_tokens  longest response
        stop        ids that end a response
        logprobs    without them vLLM is some percent faster

        A text is a function of (weights, prompt, seed): not of the other requests, the rank or what
        was sampled before. On a card that holds for the draws, but not for the last bits of the
        logits, which depend on the batch: a text can part from its twin where two words are about
        as likely (vLLM's VLLM_BATCH_INVARIANT=1 is for who needs more, and slower). top_p and top_k
        are off, so the log-probs are those of the full softmax(logits / temperature).

        A prompt that leaves no room for a response raises ValueError: vLLM would refuse it. The tp
        ranks of one engine must hand in the same requests; they yield the same samples.
        """
        engine = self.llm.llm_engine
        numbered = enumerate(requests)
        waiting = set()  # ids of the requests that the engine has
        try:
            while True:
                # Never fewer waiting than vLLM could take up in its next step.
                for place, request in itertools.islice(numbered, 2 * self.at_once - len(waiting)):
                    if request is None:
                        break
                    self.add(str(place), *request, max_tokens, stop, logprobs)
                    waiting.add(str(place))
                if not waiting:
                    return
                for done in engine.step():
                    waiting.remove(done.request_id)
                    yield int(done.request_id), sample_of(done.outputs[0])
        finally:
            # Whoever listened may have left in the middle: then its requests leave, too.
            engine.abort_request(list(waiting))

    def add(self, name, prompt, seed, temperature, max_tokens, stop, logprobs):
        """Hand one request to vLLM."""
        room = self.max_len - len(prompt)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room in a window of {self.max_len}"
            )
        sampling = self.vllm.SamplingParams(
            temperature=temperature,
            seed=seed,
            logprobs=0 if logprobs else None,
            # A few lists a sample. The default is two objects a token, which takes 2.5 times the
            # memory and 3.6 times the time.
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=list(stop),
            max_tokens=min(max_tokens, room),
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        # vLLM wants a list of Python's own integers.
        ids = {"prompt_token_ids": np.asarray(prompt).tolist()}
        self.llm.llm_engine.add_request(name, ids, sampling)

    def generate(self, prompts, seeds, max_tokens, temperature=1.0, stop=()):
        """One sample for every prompt with its seed, all at one temperature. -> [Sample, ...]

        A prompt that leaves no room raises ValueError before anything is sampled. With tensor
        parallelism every rank brings its own prompts: all of an engine's ranks sample them all, and
        each keeps its own.
        """
        too_long = sum(len(prompt) >= self.max_len for prompt in prompts)
        if too_long:
            raise ValueError(
                f"{too_long} prompts leave no room in a window of {self.max_len} tokens"
            )
        requests = [(prompt, seed, temperature) for prompt, seed in zip(prompts, seeds)]
        first = 0  # place of this rank's first request
        if self.tp > 1:
            from vllm.distributed import get_tp_group

            group = get_tp_group()
            by_rank = all_gather(requests, group.cpu_group)
            first = sum(len(theirs) for theirs in by_rank[: group.rank_in_group])
            requests = [request for theirs in by_rank for request in theirs]
        samples = dict(self.stream(requests, max_tokens, stop))
        return [samples[first + i] for i in range(len(prompts))]

    def sleep(self):
        """Hand the card's memory to the trainer until the next sync.

        On a CPU there is nothing to hand over.
        """
        if self.cuda and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self, policy, dtype):
        """Load the policy's weights and drop the prefix cache. A collective.

        One call streams the tensors in module order, with every name of a tied pair. After a sleep
        the weights wake first, and the KV cache only when they are in: both, beside the trainer's
        leftovers, may not fit. A rank whose weights break off raises, and its end is the other
        ranks' end; the run goes on from its checkpoint.
        """
        self.sleep()  # before the first sync nobody has asked for it
        if self.asleep:
            self.torch.cuda.empty_cache()  # what the trainer holds but does not use
            self.llm.wake_up(tags=["weights"])
        weights = {"weights_iterator": policy.weights(dtype)}
        self.llm.collective_rpc("reload_weights", kwargs=weights)
        if self.asleep:
            self.torch.cuda.empty_cache()  # the tensors that were gathered
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: samples would mix old and new weights")


def sample_of(output):
    """vLLM's output of a request as a `Sample`."""
    logprobs = output.logprobs.logprobs if output.logprobs else []
    return Sample(
        tokens=np.array(output.token_ids, np.int32),  # (R,)
        logprobs=np.array(logprobs, np.float32),  # (R,)
        finished=output.finish_reason == "stop",
    )


def unlink_shared_memory():
    """Remove the names of the memory that vLLM's CPU ranks share in this engine.

    The memory itself stays.

    vLLM gives it the same names in every run. A run that is killed would leave them behind, and the
    next could not start. All ranks of this engine have opened the memory by now, so the names can
    go: those of files that this process has mapped. A name that is unlinked, and may be another
    run's by now, has " (deleted)" behind it in the list of mappings.
    """
    mappings = Path("/proc/self/maps").read_text().splitlines()
    for mapping in set(mappings):
        shared = re.search(r"/dev/shm/\S*-cpushm_\S*$", mapping)
        if shared:
            Path(shared[0]).unlink(missing_ok=True)


def check_mismatch(trainer_logp, updates, bound):
    """Compare trainer and sampler on what was sampled, over all ranks. A collective.

    trainer_logp  [[(R,), ...], ...] of the micro-batches of each update, by the policy that sampled
    updates       [[micro-batch, ...], ...], each with the engine's sampler_logp (R,)
    bound         of the mean of |trainer - sampler|

    They are two programs with the same weights. Where they disagree, samples came from other weights than
    those that learn from them, and a `Failure` is raised.
    -> {"mismatch_mean", "mismatch_max"} of the absolute difference of log-probs
    """
    total = count = largest = 0.0  # of this rank
    for logps, micro_batches in zip(trainer_logp, updates):
        for logp, micro_batch in zip(logps, micro_batches):
            difference = (logp - micro_batch.sampler_logp).abs()  # (R,)
            if len(difference):  # not a dummy
                total += difference.sum().item()
                count += len(difference)
                largest = max(largest, difference.max().item())
    total, count = all_sum([total, count])
    (largest,) = all_max([largest])
    mean = total / count
    if not mean <= bound:
        raise Failure(
            f"engine and trainer disagree on the sampled tokens: mean log-prob mismatch {mean:.3g}, bound "
            f"{bound:g} (--max-mismatch). The engine is not sampling from the weights in training: the weight "
            "sync is broken, its cache is stale, or the two compute differently (dtype, temperature, template)"
        )
    return {"mismatch_mean": mean, "mismatch_max": largest}
