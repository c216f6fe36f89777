"""Makes sampling.json: what the logits processors of `transformers` leave of a distribution.

pip: transformers==4.57.6 torch==2.9.1, Python 3.11; `python make_golden.py`, some seconds.

`GenerationMixin._get_logits_processor` builds the processors from a `GenerationConfig`, so their order is its own. What it
has no processor for, presence and frequency penalties, is given to it as one of the caller's own, after OpenAI's formula.
Each case is computed in f64 and in f32 and must keep the same tokens in both, so that no kept set hangs on rounding; the
probabilities are the f64 ones. Parameters are rounded to f32, in which requests carry them.

Logits are a formula, `logits` here and in `sampler/golden.rs`: 24 bits of a linear congruential generator, in [-8, 8), exact
in f32. With fewer bits there are ties, at the borders of the sets too.
"""
import functools
import json
import pathlib
import random

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.utils import GenerationMixin

# TopPLogitsWarper sorts upwards and drops from below. Which of equals comes first torch leaves to the machine; here the lower id.
torch.sort = functools.partial(torch.sort, stable=True)

STOP = [2, 5]
BANNED = [7, 11]


def logits(seed, vocab, bits):
    state, out = seed, []
    for _ in range(vocab):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.append(((state >> (64 - bits)) - 2 ** (bits - 1)) * 2.0 ** (4 - bits))
    return out


class Penalties(LogitsProcessor):
    def __init__(self, prompt_len, presence, frequency):
        self.prompt_len, self.presence, self.frequency = prompt_len, presence, frequency

    def __call__(self, input_ids, scores):
        counts = torch.bincount(input_ids[0, self.prompt_len :], minlength=scores.shape[-1])
        return scores - counts * self.frequency - (counts > 0) * self.presence


class Model(GenerationMixin):
    def __init__(self):
        pass


def distribution(case, dtype):
    p = case["params"]
    f32 = lambda name, default: float(np.float32(p.get(name, default)))
    stop = p.get("stop_token_ids", []) + ([] if p.get("ignore_eos") else STOP)
    temperature = f32("temperature", 0.0)
    config = GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_k=p.get("top_k", 0), top_p=f32("top_p", 1), min_p=f32("min_p", 0),
        typical_p=f32("typical_p", 1), repetition_penalty=f32("repetition_penalty", 1), min_new_tokens=p.get("min_new_tokens", 0),
        sequence_bias={(i,): float(np.float32(b)) for i, b in p["logit_bias"]} if p.get("logit_bias") else None, suppress_tokens=BANNED,
    )
    config._eos_token_tensor = torch.tensor(stop) if stop else None
    own = Penalties(len(case["prompt"]), f32("presence_penalty", 0), f32("frequency_penalty", 0))
    processors = Model()._get_logits_processor(config, input_ids_seq_length=len(case["prompt"]), logits_processor=[own], device="cpu")
    scores = torch.tensor([logits(*case["logits"])], dtype=dtype)
    return processors(torch.tensor([case["prompt"] + case["generated"]]), scores)[0]


def make(name, logits, prompt, generated, **params):
    case = {"name": name, "logits": logits, "prompt": prompt, "generated": generated, "params": params}
    scores, single = distribution(case, torch.float64), distribution(case, torch.float32)
    if params.get("temperature", 0.0) == 0.0:
        assert scores.argmax() == single.argmax(), name
        return case | {"token_id": int(scores.argmax())}
    kept = torch.isfinite(scores).nonzero()[:, 0].tolist()
    if kept != torch.isfinite(single).nonzero()[:, 0].tolist():
        return None
    return case | {"kept": kept, "probabilities": [float(np.float32(x)) for x in torch.softmax(scores, -1)[kept]]}


def main():
    rng = random.Random(4)
    fine, ties, wide = [17, 96, 24], [18, 96, 4], [19, 32003, 24]
    ids = lambda n: [rng.randrange(96) for _ in range(n)]
    prompt, generated = ids(12), [3, 3, 3, 40, 2, 90]
    single = {
        "temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.6, "repetition_penalty": 1.3, "presence_penalty": 1.5,
        "frequency_penalty": 0.75, "logit_bias": [[i, rng.uniform(-9, 9)] for i in [0, 3, 7, 60]], "min_new_tokens": 7,
    }
    cases = [make("plain", fine, prompt, generated, temperature=1.0), make("greedy", fine, prompt, generated)]
    for name, value in single.items():
        for source, bits in [("fine", fine), ("ties", ties)]:
            cases.append(make(f"{name} alone, {source} logits", bits, prompt, generated, **{"temperature": 1.0, name: value}))
    cases += [
        make("penalties below 1 and 0", fine, prompt, generated, temperature=1.0, repetition_penalty=0.6, presence_penalty=-2.0, frequency_penalty=-1.0),
        make("minimum reached", fine, prompt, generated, temperature=1.0, min_new_tokens=6),
        make("minimum with own stop ids", fine, prompt, generated, temperature=1.0, min_new_tokens=7, stop_token_ids=[1, 9]),
        make("minimum with own stop ids only", fine, prompt, generated, temperature=1.0, min_new_tokens=7, stop_token_ids=[1, 9], ignore_eos=True),
        make("bias on banned ids", fine, prompt, generated, temperature=1.0, logit_bias=[[7, 100.0], [11, 100.0]]),
        make("large vocabulary, top-p", wide, prompt, generated, temperature=0.2, top_p=0.05),
        make("large vocabulary, typical", wide, prompt, generated, temperature=0.3, top_k=400, typical_p=0.2),
        make("large vocabulary, all", wide, prompt, generated, temperature=0.5, top_k=200, top_p=0.9, min_p=0.3, typical_p=0.8, repetition_penalty=1.1),
    ]
    choices = {
        "top_k": lambda: rng.choice([1, 3, 20, 90, 200]), "top_p": lambda: rng.choice([0.3, 0.9, 0.99]), "min_p": lambda: rng.choice([0.01, 0.2, 1.0]),
        "typical_p": lambda: rng.choice([0.2, 0.5, 0.95]), "repetition_penalty": lambda: rng.choice([0.8, 1.2, 2.0]),
        "presence_penalty": lambda: rng.choice([-1.0, 0.5, 2.0]), "frequency_penalty": lambda: rng.choice([-0.5, 0.3, 1.0]),
        "logit_bias": lambda: [[i, rng.uniform(-12, 12)] for i in rng.sample(range(96), 6)], "min_new_tokens": lambda: rng.choice([3, 9]),
        "stop_token_ids": lambda: ids(2), "ignore_eos": lambda: True,
    }
    number = left_out = 0
    while number < 60:
        params = {name: choose() for name, choose in choices.items() if rng.random() < 0.5}
        temperature = rng.choice([0.0, 0.4, 0.9, 1.0, 1.7])
        bits = rng.choice([4, 6, 24, 24])
        case = make(f"random {number}", [100 + number, 96, bits], ids(rng.randrange(1, 20)), ids(rng.randrange(0, 8)), temperature=temperature, **params)
        # Equal scores at a border of typical-p differ in f32 by their rounding alone.
        left_out += case is None
        number += case is not None
        cases += [case] if case else []
    assert None not in cases and left_out < 10, left_out
    text = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    out = pathlib.Path(__file__).with_name("sampling.json")
    out.write_text('{"stop":%s,"banned":%s,"cases":[\n%s\n]}\n' % (STOP, BANNED, text))
    print(len(cases), "cases,", left_out, "left out,", out.stat().st_size, "bytes")


main()
