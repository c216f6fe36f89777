"""`transformers` as the other side of side_by_side.py: loads once, then measures what each line on stdin asks for.

A request is a line of JSON, so is the answer: {"ready"} first; {"image": FILE} gives preprocess_ms and encode_ms;
{"ids": [...], "new_tokens": N} gives prefill_ms, decode_ms (of the N - 1 further tokens) and token_ids. f32 with sdpa attention,
which is its fastest way on a CPU without bf16 arithmetic.
"""
import json
import sys
import time

import torch
from PIL import Image
from transformers import Idefics2ForConditionalGeneration, Idefics2ImageProcessor


def timed(work):
    start = time.perf_counter()
    out = work()
    return out, (time.perf_counter() - start) * 1e3


def encode(model, processor, file):
    x, preprocess_ms = timed(lambda: processor([[Image.open(file).convert("RGB")]], return_tensors="pt"))
    _, encode_ms = timed(lambda: model.model.get_image_features(x["pixel_values"], x["pixel_attention_mask"]))
    return {"preprocess_ms": preprocess_ms, "encode_ms": encode_ms}


def generate(model, ids, new_tokens):
    out, prefill_ms = timed(lambda: model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1))
    tokens = [int(out.logits[0, -1].argmax())]
    start = time.perf_counter()
    while len(tokens) < new_tokens:
        out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return {"prefill_ms": prefill_ms, "decode_ms": (time.perf_counter() - start) * 1e3, "token_ids": tokens}


def main(folder, threads):
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = Idefics2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    processor = Idefics2ImageProcessor.from_pretrained(folder)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = encode(model, processor, request["image"]) if "image" in request else generate(model, request["ids"], request["new_tokens"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
