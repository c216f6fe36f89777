"""`transformers` beside `idefics`: the reference of parity.py, and the other side of every measurement.

    peer.py parity CHECKPOINT --prompts FILE.json --out FILE.npz    log-probabilities and image tokens in f32 and bf16
    peer.py speed CHECKPOINT --seconds N                            the card's roofs, load, vision, prefill and decode in bf16, a
                                                                    line of JSON for each, as far as the time goes

Works with transformers 4.57 (all but the compiled steps) and 5, on a card (`--device cuda`) or, for a dry run, on the CPU.
"""
import argparse
import json
import pathlib
import statistics
import time

import numpy as np
import torch
import transformers
from transformers import AutoConfig, Idefics2ForConditionalGeneration, StaticCache

import cases

# What `--wrong` changes in the reference, which then differs from idefics in one formula: parity.py must notice each.
WRONG = {
    "none": lambda config: None,
    "rope": lambda config: set_rope_theta(config.text_config, 1.05),
    "window": lambda config: setattr(config.text_config, "sliding_window", 24),
    "text-norm": lambda config: setattr(config.text_config, "rms_norm_eps", 1e-1),
    "vision-norm": lambda config: setattr(config.vision_config, "layer_norm_eps", 1e-1),
    "vision-gelu": lambda config: setattr(config.vision_config, "hidden_act", "silu"),
    "perceiver-mlp": lambda config: setattr(config.perceiver_config, "hidden_act", "gelu"),
}


def set_rope_theta(config, factor):
    parameters = getattr(config, "rope_parameters", None)  # transformers 5
    if parameters is None:
        config.rope_theta *= factor
    else:
        parameters["rope_theta"] *= factor


def load(folder, dtype, device, wrong="none"):
    config = AutoConfig.from_pretrained(folder)
    WRONG[wrong](config)
    options = {"config": config, "dtype": dtype, "attn_implementation": "sdpa"}
    try:
        # Straight to the card where accelerate is installed.
        model = Idefics2ForConditionalGeneration.from_pretrained(folder, device_map=device, **options)
    except (ImportError, ValueError):
        model = Idefics2ForConditionalGeneration.from_pretrained(folder, **options).to(device)
    return model.eval()


def places_in_f32(model):
    """transformers 5 rounds a patch's place to the type of the pixels, so that in bf16 half of those at 1/70, 2/70 and so on get the
    position before: a difference several times that of rounding, and not of the published model."""
    embeddings = model.model.vision_model.embeddings
    embeddings.register_forward_pre_hook(lambda _, args, named: (args, named | {"pixel_values": named["pixel_values"].float()}), with_kwargs=True)
    embeddings.patch_embedding.register_forward_pre_hook(lambda convolution, args: (args[0].to(convolution.weight.dtype),))


def pixels(tiles, dtype, device):
    """`pixel_values` [1, tiles, 3, H, W] and their mask, tiles of different sizes padded as Idefics2ImageProcessor does."""
    height, width = max(t.shape[0] for t in tiles), max(t.shape[1] for t in tiles)
    values = torch.zeros(1, len(tiles), 3, height, width, dtype=torch.float32)
    mask = torch.zeros(1, len(tiles), height, width, dtype=torch.bool)
    for i, tile in enumerate(tiles):
        x = torch.from_numpy(tile.astype(np.float32)).permute(2, 0, 1)
        values[0, i, :, : tile.shape[0], : tile.shape[1]] = (x / 255 - 0.5) / 0.5
        mask[0, i, : tile.shape[0], : tile.shape[1]] = True
    return values.to(device, dtype), mask.to(device)


def image_tokens(model, values, mask):
    """[tiles x latents, hidden]"""
    out = model.model.get_image_features(values, mask)
    out = getattr(out, "pooler_output", out)  # transformers 5
    return out.reshape(-1, out.shape[-1])


def parity(options, plan):
    if int(transformers.__version__.split(".")[0]) < 5:
        # Its f32 gives patches on the border of two positions the one before: not what the published model computes.
        raise SystemExit(f"transformers is {transformers.__version__}, whose patch positions are wrong in f32; expected 5.17 or later")
    prompts, arrays = json.loads(options.prompts.read_text()), {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        model = load(options.checkpoint, dtype, options.device, options.wrong)
        places_in_f32(model)
        for picture in plan.parity_pictures:
            tokens = image_tokens(model, *pixels(picture.tiles(), dtype, options.device))
            arrays[f"{name} image {picture.name}"] = tokens.float().cpu().numpy()
        for number, prompt in enumerate(prompts):
            inputs = {"input_ids": torch.tensor([prompt["ids"]], device=options.device)}
            if prompt["picture"]:
                inputs["pixel_values"], inputs["pixel_attention_mask"] = pixels(plan.parity_pictures[0].tiles(), dtype, options.device)
            logits = model(**inputs).logits.float()
            arrays[f"{name} logprobs {number}"] = torch.log_softmax(logits[0], dim=-1).cpu().numpy()
        del model
        empty_cache(options.device)
    np.savez(options.out, **arrays)


def on_card(device):
    return device.startswith("cuda")


def synchronize(device):
    if on_card(device):
        torch.cuda.synchronize()


def empty_cache(device):
    if on_card(device):
        torch.cuda.empty_cache()


def timed(device, work, warm=2, repeats=5):
    """Median milliseconds of `work`, after `warm` calls that do not count."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def roofs(device, plan):
    """What the card gives: bytes a second of a copy, counting reads and writes; a product of bf16 matrices, FLOP a second."""
    x = torch.randint(0, 256, (plan.roof_copy_bytes,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    n = plan.roof_matmul
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    # Several in a row, so that the card does not wait for the host.
    times = 10 if on_card(device) else 1
    each = lambda work: timed(device, lambda: [work() for _ in range(times)], repeats=7) / times
    copy, product = each(lambda: y.copy_(x)), each(lambda: torch.mm(a, b, out=c))
    what = torch.cuda.get_device_name() if on_card(device) else "cpu"
    return {"device": what, "copy_bytes_per_s": 2 * x.numel() / copy * 1e3, "matmul_flop_per_s": 2 * n**3 / product * 1e3}


def random_ids(model, batch, tokens):
    return torch.randint(3, model.config.text_config.vocab_size - 16, (batch, tokens), device=model.device)


class Decoder:
    """The model with a cache that grows, for sequences of one length. All have the same keys and values: the time does not
    depend on them."""

    def __init__(self, model, batch, context):
        self.model, self.cache = model, None
        # In chunks, so that the activations fit beside the cache.
        for ids in random_ids(model, 1, context).split(1024, dim=1):
            out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = out.past_key_values
        self.cache.batch_repeat_interleave(batch)
        self.next = random_ids(model, batch, 1)

    def step(self):
        out = self.model(input_ids=self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next = out.logits[:, -1:].argmax(-1)


class CompiledDecoder:
    """The same with a cache of a fixed size, and the step compiled into one CUDA graph: what `generate` does with
    `cache_implementation="static"`, at its best. A cache with a sliding window counts its tokens in a Python number, so that every
    position would be a graph of its own; up to the window's 4096 tokens it makes no difference, and is left out."""

    def __init__(self, model, batch, context, steps):
        # Graphs of the case before hold memory.
        torch.compiler.reset()
        text = model.config.get_text_config()
        text.sliding_window = None
        self.cache = StaticCache(config=text, max_cache_len=context + steps)
        self.cache.early_initialization(batch, text.num_key_value_heads, model.model.text_model.layers[0].self_attn.head_dim, model.dtype, model.device)
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
        # One case, one shape.
        self.forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False) if on_card(model.device.type) else model.forward
        self.next = random_ids(model, batch, 1)

    def step(self):
        torch.compiler.cudagraph_mark_step_begin()
        out = self.forward(input_ids=self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next = out.logits[:, -1:].argmax(-1)


def speed(options, plan):
    end = time.monotonic() + options.seconds
    device = options.device

    def measure(case, work):
        """A line for `case` with what `work` returns, or why there is nothing. What `transformers` cannot is no fault of ours."""
        try:
            result = work() if time.monotonic() < end else {"why": "out of time"}
        except Exception as error:
            result = {"why": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(case | result), flush=True)
        empty_cache(device)

    measure({"kind": "roofs"}, lambda: roofs(device, plan))
    start = time.perf_counter()
    model = load(options.checkpoint, torch.bfloat16, device)
    synchronize(device)
    print(json.dumps({"kind": "load", "engine": "both", "seconds": time.perf_counter() - start}), flush=True)
    for picture in plan.speed_pictures:
        values, mask = pixels(picture.tiles(), torch.bfloat16, device)
        measure({"kind": "vision", "name": picture.name}, lambda: {"ms": timed(device, lambda: image_tokens(model, values, mask), repeats=plan.repeats)})
    for tokens in plan.prefill_tokens:
        ids = random_ids(model, 1, tokens)
        measure({"kind": "prefill", "tokens": tokens}, lambda: {"ttft_ms": timed(device, lambda: model(input_ids=ids, logits_to_keep=1), repeats=plan.repeats)})
    warm, repeats = 4, 3 * plan.repeats
    for batch, context in plan.decode:
        measure({"kind": "decode", "batch": batch, "context": context}, lambda: {"ms": timed(device, Decoder(model, batch, context).step, warm, repeats)})
    # Last: they change the model's configuration, and compiling takes as long as it likes.
    for batch, context in plan.decode_compiled:
        work = lambda: {"ms": timed(device, CompiledDecoder(model, batch, context, warm + repeats).step, warm, repeats)}
        measure({"kind": "decode_compiled", "batch": batch, "context": context}, work)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["parity", "speed"])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--prompts", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--wrong", choices=WRONG, default="none")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    # f32 is f32: TF32 would be a reference little better than bf16.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    {"parity": parity, "speed": speed}[options.mode](options, cases.QUICK if options.quick else cases.FULL)


if __name__ == "__main__":
    main()
