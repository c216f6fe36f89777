"""Makes demo/sampling.json: greedy answers of the demo checkpoint under penalties, bias and stop ids: make_sampling.py.

Pictures and questions are those of demo/cases.json. `flags` are what `idefics ask` is given; `generate` gets the same. At each
step the margin between the two best processed scores is above SMALLEST_MARGIN, so that rounding decides nothing.
"""
import json
import pathlib
import sys

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessor

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import reference  # noqa: E402

SUPPRESSED = [600, 601]  # <fake_token_around_image>, <image>
STOP = [2, 602]  # </s>, <end_of_utterance>
SMALLEST_MARGIN = 1e-2
# Index into demo/cases.json, options.
CASES = [
    (0, {"repetition_penalty": 1.5, "min_new_tokens": 16, "max_new_tokens": 24}),
    (5, {"presence_penalty": 2.0, "frequency_penalty": 1.5, "min_new_tokens": 20, "max_new_tokens": 28}),
    (6, {"frequency_penalty": -1.0, "repetition_penalty": 1.2, "max_new_tokens": 24, "ignore_eos": True}),
    (7, {"logit_bias": {399: -100.0, 463: 12.5, 601: 100.0}, "max_new_tokens": 24}),
    (1, {"stop_token_ids": [483, 602], "ignore_eos": True, "min_new_tokens": 14, "max_new_tokens": 24}),
    (2, {"logit_bias": {602: -100.0, 2: -100.0}, "repetition_penalty": 2.0, "presence_penalty": 0.5, "max_new_tokens": 24}),
]


class Penalties(LogitsProcessor):
    """OpenAI's: over generated tokens."""

    def __init__(self, prompt_len, presence, frequency):
        self.prompt_len, self.presence, self.frequency = prompt_len, presence, frequency

    def __call__(self, input_ids, scores):
        counts = torch.bincount(input_ids[0, self.prompt_len :], minlength=scores.shape[-1])
        return scores - counts * self.frequency - (counts > 0) * self.presence


def flags(options):
    out = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-").removesuffix("s") if name == "stop_token_ids" else "--" + name.replace("_", "-")
        if name == "logit_bias":
            out += [f"{flag}={i}={b}" for i, b in value.items()]
        elif value is True:
            out.append(flag)
        else:
            out += [f"{flag}={v}" for v in (value if isinstance(value, list) else [value])]
    return out


@torch.no_grad()
def main():
    model, processor = reference.load(HERE.parent.parent / "services/idefics/demo/checkpoint", split=False)
    demo, cases = json.loads((HERE / "demo/cases.json").read_text())["cases"], []
    for index, options in CASES:
        f32 = lambda name, default: float(np.float32(options.get(name, default)))
        source = demo[index]
        pictures = [Image.open(HERE / "demo" / p["path"]) for m in source["messages"] for p in m["content"] if p["type"] == "image"]
        plain = [m | {"content": [{"type": "image"} if p["type"] == "image" else p for p in m["content"]]} for m in source["messages"]]
        x = processor(text=processor.apply_chat_template(plain, add_generation_prompt=True), images=[pictures], return_tensors="pt")
        prompt_len = x["input_ids"].shape[1]
        assert x["input_ids"][0].tolist() == source["prompt_token_ids"]
        stop = options.get("stop_token_ids", []) + ([] if options.get("ignore_eos") else STOP)
        bias = {(i,): float(b) for i, b in options.get("logit_bias", {}).items()}
        g = model.generate(
            **x, do_sample=False, max_new_tokens=options.get("max_new_tokens", 256), min_new_tokens=options.get("min_new_tokens", 0),
            # Never generated: as good as none.
            eos_token_id=stop or SUPPRESSED[:1], pad_token_id=0, suppress_tokens=SUPPRESSED, repetition_penalty=f32("repetition_penalty", 1.0),
            sequence_bias=bias or None, logits_processor=[Penalties(prompt_len, f32("presence_penalty", 0), f32("frequency_penalty", 0))],
            return_dict_in_generate=True, output_scores=True,
        )
        new = g.sequences[0][prompt_len:].tolist()
        margin = min(float(t[0] - t[1]) for t in (s[0].topk(2).values for s in g.scores))
        print(f"{margin:.4f}", flags(options), repr(processor.tokenizer.decode(new)))
        assert margin > SMALLEST_MARGIN and new != source["token_ids"], "choose other options"
        cases.append({"case": index, "flags": flags(options), "token_ids": new, "finish_reason": "stop" if new[-1] in stop else "length", "smallest_margin": round(margin, 4)})
    lines = ",\n".join(json.dumps(case) for case in cases)
    (HERE / "demo/sampling.json").write_text(f"[\n{lines}\n]\n")


main()
