"""
What a run would cost: from counted work to seconds, hours and a price.

Everything here is an estimate. The work of a step is counted (tools/trace.py), or follows from the lengths of
prompts and answers; how fast a card does it is its maker's peak rate times the share of it that training and
vLLM are known to reach. docs/cost.md compares estimates with measured steps and published runs.
"""

import os
import time
from dataclasses import dataclass

import torch

from lib import dist as ranks
from lib.files import Failure


@dataclass
class Card:
    """What a card can do.

    math     operations a second in products of bf16 matrices that are summed in fp32, dense
    reads    bytes a second from its memory
    gb       its memory in 1e9 bytes
    link     bytes a second from the other cards of its node
    host     bytes a second from the memory of its host
    computed, read  shares of `math` and `reads` that are reached
    engine_step     seconds of an engine's step beside the card's work: scheduling, launching kernels
    """

    math: float
    reads: float
    gb: float
    link: float
    host: float
    computed: float = 0.35
    read: float = 0.7
    engine_step: float = 2e-3

    @property
    def math_reached(self):
        return self.math * self.computed

    @property
    def reads_reached(self):
        return self.reads * self.read


# The shares that are reached, for all cards alike:
# - computed: prime-rl's SFT of Qwen3-4B on eight H100 with full recomputation (its BENCHMARKS.md) reaches 26.6 %
#   of the peak where six operations are counted a parameter, and so 35 % where the eight are that are computed.
# - read: vLLM takes 30.9 ms a token for Qwen2.5-72B on two H100 (tt-inference-server issue 143), which is 70 % of
#   their bandwidth.
#
# NVIDIA's data sheets (of the SXM form where there are several); their figures "with sparsity" are halved.
# RTX 3090 and 4090: the white papers of GA102 and AD102, "FP16 Tensor TFLOPS with FP32 accumulate".
# link: NVLink where the card has it, in one direction, else PCIe; host: PCIe in one direction.
CARDS = {
    "H200": Card(989e12, 4.8e12, 141, 450e9, 64e9),
    "H100": Card(989e12, 3.35e12, 80, 450e9, 64e9),
    "A100": Card(312e12, 2.039e12, 80, 300e9, 32e9),
    "A100-40GB": Card(312e12, 1.555e12, 40, 300e9, 32e9),
    "H20": Card(148e12, 4.0e12, 96, 450e9, 64e9),
    "L40S": Card(362e12, 0.864e12, 48, 32e9, 32e9),
    "A6000": Card(155e12, 0.768e12, 48, 56e9, 32e9),
    "RTX4090": Card(165e12, 1.008e12, 24, 32e9, 32e9),
    "RTX3090": Card(71e12, 0.936e12, 24, 56e9, 32e9),
}
THIS = "this"  # the card, or the CPU, of this machine: its rates are measured on the spot


def card_named(name, dtype):
    """A `Card` by its name. Raises Failure for an unknown one. dtype: in which THIS is measured"""
    if name == THIS:
        return measured_card(dtype)
    if name not in CARDS:
        raise Failure(f"--card {name}: known are {', '.join(CARDS)} and {THIS}, which is measured")
    return CARDS[name]


def measured_card(dtype):
    """The device of this process as a `Card`, by a product of matrices and one of a matrix and a vector.

    The shares are those of the measured rates, and so they are larger than those of a data sheet's.
    """
    device = torch.device("cuda" if ranks.CUDA else "cpu")
    width = 8192 if ranks.CUDA else 1024
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    large = torch.randn(2**14, 2**12, device=device, dtype=dtype)  # more than a cache holds
    vector = torch.randn(2**12, device=device, dtype=dtype)
    math = 2 * width**3 / mean_seconds(lambda: a @ b)
    reads = large.nbytes / mean_seconds(lambda: large @ vector)
    if ranks.CUDA:
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Card(
        math,
        reads,
        memory / 1e9,
        link=reads,
        host=reads,
        computed=0.6,
        read=0.8,
        # Without graphs, vLLM's Python takes most of a small model's step on a CPU (docs/speed.md).
        engine_step=2e-3 if ranks.CUDA else 15e-3,
    )


def mean_seconds(call, window=2.0):
    """Mean of the seconds that a call takes on the device of this process.

    Over a window of so many seconds: on a machine that others use, a single call may find it idle.
    """
    call()  # warms up
    start = time.monotonic()
    count = 0
    while count == 0 or time.monotonic() - start < window:
        call()
        if ranks.CUDA:
            torch.cuda.synchronize()
        count += 1
    return (time.monotonic() - start) / count


@dataclass
class Work:
    """What a card does in a step.

    score, learn  operations of the log-probs of all judgments, and of all updates
    updated       bytes that the optimizer reads and writes
    sync          bytes of weights that go to the engine
    moved         bytes that go to the host's memory and back (--offload)
    sampling      `Sampling`; None in SFT
    """

    score: float
    learn: float
    updated: float
    sync: float
    moved: float
    sampling: "Sampling | None"


@dataclass
class Sampling:
    """What an engine samples in a step. An engine of several cards: what falls to one of them.

    prompts, samples  their numbers
    prompt, answer    their mean lengths in tokens
    longest           tokens of the longest answer
    parameters        of the model
    weights           bytes
    token             bytes that a token takes in the cache
    at_once           samples that decode at the same time
    """

    prompts: float
    samples: float
    prompt: float
    answer: float
    longest: float
    parameters: float
    weights: float
    token: float
    at_once: float


def sampling_seconds(work, card):
    """Seconds that an engine takes to sample.

    A step of the engine gives each running sample a token. It reads all weights once, or computes with them,
    whichever takes longer, and reads what the cache holds of each sample. The engine is full until all but the
    longest samples are done; then the longest go on alone. A prompt is computed once for its group.
    """
    prefill = work.prompts * work.prompt * 2 * work.parameters / card.math_reached
    full_steps = work.samples * work.answer / work.at_once
    last_steps = work.longest - work.answer
    reading = work.weights / card.reads_reached
    computing = work.at_once * 2 * work.parameters / card.math_reached
    context = work.prompt + work.answer / 2  # tokens that a sample has, on average
    cache = work.samples * work.answer * context * work.token / card.reads_reached
    decode = full_steps * max(reading, computing) + last_steps * reading + cache
    return prefill + decode + (full_steps + last_steps) * card.engine_step


def step_seconds(work, card, ranks_count):
    """Seconds of each phase of a step, as in metrics.jsonl."""
    learn = work.learn / card.math_reached + work.updated / card.reads_reached
    if not work.sampling:
        return {"step": learn}
    return {
        "sample": sampling_seconds(work.sampling, card),
        "score": work.score / card.math_reached,
        "learn": learn + work.moved / card.host,
        "sync": work.sync / (card.link if ranks_count > 1 else card.reads_reached),
    }
