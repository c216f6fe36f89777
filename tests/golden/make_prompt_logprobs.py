"""Makes demo/prompt_logprobs.json: log-probabilities of prompts of the demo checkpoint: make_prompt_logprobs.py.

Pictures and questions are those of demo/cases.json. One forward pass over the prompt; the values at a place are the
log-softmax of the logits at the place before it.
"""
import json
import pathlib
import sys

import torch
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import reference  # noqa: E402

# Indices into demo/cases.json: the one with two pictures is among them.
CASES = [0, 1, 3]
TOP = 2


@torch.no_grad()
def main():
    model, processor = reference.load(HERE.parent.parent / "services/idefics/demo/checkpoint", split=False)
    demo, cases = json.loads((HERE / "demo/cases.json").read_text())["cases"], []
    for index in CASES:
        source = demo[index]
        pictures = [Image.open(HERE / "demo" / p["path"]) for m in source["messages"] for p in m["content"] if p["type"] == "image"]
        plain = [m | {"content": [{"type": "image"} if p["type"] == "image" else p for p in m["content"]]} for m in source["messages"]]
        x = processor(text=processor.apply_chat_template(plain, add_generation_prompt=True), images=[pictures], return_tensors="pt")
        ids = x["input_ids"][0]
        assert ids.tolist() == source["prompt_token_ids"]
        logprobs = torch.log_softmax(model(**x).logits[0, :-1], -1)
        own, top = logprobs.gather(1, ids[1:, None])[:, 0], logprobs.topk(TOP)
        print(index, len(pictures), "pictures", len(ids), "tokens", float(own.min()), float(own.max()))
        cases.append({
            "case": index, "logprobs": [round(float(v), 5) for v in own],
            "top": [[[int(i), round(float(v), 5)] for i, v in zip(*place)] for place in zip(top.indices, top.values)],
        })
    lines = ",\n".join(json.dumps(case) for case in cases)
    (HERE / "demo/prompt_logprobs.json").write_text(f"[\n{lines}\n]\n")


main()
