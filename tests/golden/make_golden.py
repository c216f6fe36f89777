"""Makes the reference values of the parity tests: make_golden.py (versions and how to run it are in README.md).

Writes, beside itself:
  random/  config files and the list of weights of a random checkpoint (`synthetic.py` has the values), cases.json,
           encodes.json with image_tokens.safetensors
  demo/    encodes.json with image_tokens.safetensors for the demo checkpoint (its cases.json comes from the recipe)

Each sub-image goes through the vision tower by itself, which is what the reference's padding and masks amount to: the script
checks that on the cases with several sub-images. Greedy tokens come from `generate` with its cache, and are checked against
one forward pass without a cache under an explicit sliding-window mask.
"""
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import reference  # noqa: E402
import synthetic  # noqa: E402

DEMO = HERE.parent.parent / "services/idefics/demo/checkpoint"
RANDOM = HERE / "random"
SUPPRESSED = [600, 601]  # <fake_token_around_image>, <image>: a served model never generates them
SMALLEST_MARGIN = 1e-2  # logits; rounding moves them by less than 1e-3
HIDDEN, VISION, HEADS, KV_HEADS = 128, 144, 6, 2

# As sparse as the hub's: what equals a class default is left out. So is the Perceiver's hidden_size and rms_norm_eps, which
# then come from the text model; eps is large enough that taking the class default instead shows in the image tokens.
CONFIG = {
    "architectures": ["Idefics2ForConditionalGeneration"],
    "image_token_id": 601,
    "model_type": "idefics2",
    "perceiver_config": {"model_type": "idefics2", "num_key_value_heads": KV_HEADS, "resampler_n_heads": HEADS},
    "text_config": {
        "head_dim": 128, "hidden_size": HIDDEN, "intermediate_size": 256, "max_position_embeddings": 2048, "model_type": "mistral",
        "num_attention_heads": HEADS, "num_hidden_layers": 3, "num_key_value_heads": KV_HEADS, "pad_token_id": 0,
        "rms_norm_eps": 0.01, "sliding_window": 24, "vocab_size": 603,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": VISION, "image_size": 980, "intermediate_size": 288, "model_type": "idefics2", "num_attention_heads": 2,
        "num_hidden_layers": 2, "patch_size": 14,
    },
}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 602], "pad_token_id": 0}
PREPROCESSOR = {
    "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "Idefics2ImageProcessor", "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Idefics2Processor", "resample": 2, "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 980, "shortest_edge": 378},
}
PROCESSOR = {"image_seq_len": 64, "processor_class": "Idefics2Processor"}


def tensors():
    """(name, shape, centre, spread, exponent, zero rows) of every weight."""
    out = []

    def add(name, shape, centre, spread, exponent, zero_rows=()):
        out.append({"name": name, "shape": list(shape), "centre": centre, "spread": spread, "exponent": exponent, "zero_rows": list(zero_rows)})

    def linear(name, rows, cols, gain=1.0, bias=False):
        # Uniform from -spread to spread has deviation spread / sqrt(3); `gain` is the output's deviation for unit input.
        wanted = gain / cols**0.5 * 3**0.5
        exponent = int(np.floor(np.log2(wanted / 128)))
        exponent = exponent if wanted / 2.0**exponent < 255 else exponent + 1
        add(name + ".weight", (rows, cols), 0, int(round(wanted / 2.0**exponent)), exponent)
        if bias:
            add(name + ".bias", (rows,), 0, 50, -8)

    def norm(name, width, bias=False):
        add(name + ".weight", (width,), 128, 64, -7)
        if bias:
            add(name + ".bias", (width,), 0, 50, -8)

    v, t = CONFIG["vision_config"], CONFIG["text_config"]
    p = "model.vision_model."
    # Small, so that the eps of the first LayerNorm shows.
    add(p + "embeddings.patch_embedding.weight", (VISION, 3, 14, 14), 0, 140, -15)
    add(p + "embeddings.patch_embedding.bias", (VISION,), 0, 50, -13)
    add(p + "embeddings.position_embedding.weight", ((v["image_size"] // 14) ** 2, VISION), 0, 220, -13)
    for i in range(v["num_hidden_layers"]):
        q = f"{p}encoder.layers.{i}."
        for name in ("q_proj", "k_proj"):
            linear(q + "self_attn." + name, VISION, VISION, 1.6, True)
        linear(q + "self_attn.v_proj", VISION, VISION, 1.0, True)
        linear(q + "self_attn.out_proj", VISION, VISION, 1.0, True)
        norm(q + "layer_norm1", VISION, True)
        norm(q + "layer_norm2", VISION, True)
        linear(q + "mlp.fc1", v["intermediate_size"], VISION, 1.0, True)
        linear(q + "mlp.fc2", VISION, v["intermediate_size"], 1.0, True)
    norm(p + "post_layernorm", VISION, True)

    p = "model.connector.modality_projection."
    linear(p + "gate_proj", t["intermediate_size"], VISION, 1.5)
    linear(p + "up_proj", t["intermediate_size"], VISION, 1.5)
    linear(p + "down_proj", HIDDEN, t["intermediate_size"], 1.5)

    p = "model.connector.perceiver_resampler."
    add(p + "latents", (64, HIDDEN), 0, 220, -7)
    for i in range(3):
        q = f"{p}layers.{i}."
        norm(q + "input_latents_norm", HIDDEN)
        norm(q + "input_context_norm", HIDDEN)
        norm(q + "post_attention_layernorm", HIDDEN)
        linear(q + "self_attn.q_proj", HEADS * 96, HIDDEN, 2.0)
        linear(q + "self_attn.k_proj", KV_HEADS * 96, HIDDEN, 2.0)
        linear(q + "self_attn.v_proj", KV_HEADS * 96, HIDDEN, 1.5)
        linear(q + "self_attn.o_proj", HIDDEN, HEADS * 96, 2.0)
        linear(q + "mlp.gate_proj", 4 * HIDDEN, HIDDEN)
        linear(q + "mlp.up_proj", 4 * HIDDEN, HIDDEN)
        linear(q + "mlp.down_proj", HIDDEN, 4 * HIDDEN)
    norm(p + "norm", HIDDEN)

    p = "model.text_model."
    add(p + "embed_tokens.weight", (t["vocab_size"], HIDDEN), 0, 220, -7)
    for i in range(t["num_hidden_layers"]):
        q = f"{p}layers.{i}."
        norm(q + "input_layernorm", HIDDEN)
        norm(q + "post_attention_layernorm", HIDDEN)
        linear(q + "self_attn.q_proj", HEADS * 128, HIDDEN, 2.0)
        linear(q + "self_attn.k_proj", KV_HEADS * 128, HIDDEN, 2.0)
        linear(q + "self_attn.v_proj", KV_HEADS * 128, HIDDEN, 1.5)
        linear(q + "self_attn.o_proj", HIDDEN, HEADS * 128, 2.0)
        linear(q + "mlp.gate_proj", t["intermediate_size"], HIDDEN)
        linear(q + "mlp.up_proj", t["intermediate_size"], HIDDEN)
        linear(q + "mlp.down_proj", HIDDEN, t["intermediate_size"])
    norm(p + "norm", HIDDEN)
    # Logit 0 for the tokens that are never generated: whether log-probabilities count them or not then differs by under 1e-4.
    linear("lm_head", t["vocab_size"], HIDDEN, 4.0)
    out[-1]["zero_rows"] = SUPPRESSED
    return out


# Pictures of the random checkpoint: name -> (seed, width, height).
PICTURES = {
    "square": (1, 378, 378), "large": (2, 980, 980), "tall": (3, 490, 735), "wide": (4, 1200, 300), "narrow": (5, 400, 1000),
    "tiny": (6, 64, 64), "dot": (7, 1, 1), "line": (8, 1, 500), "odd": (9, 501, 633), "other": (10, 420, 378),
}
# (name, pictures, split, longest edge, shortest edge); None leaves the checkpoint's own.
RANDOM_ENCODES = [
    ("square", ["square"], False, None, None), ("large", ["large"], False, None, None), ("tall", ["tall"], False, None, None),
    ("wide", ["wide"], False, None, None), ("narrow", ["narrow"], False, None, None), ("tiny", ["tiny"], False, None, None),
    ("dot", ["dot"], False, None, None), ("line", ["line"], False, None, None), ("two", ["other", "tall"], False, None, None),
    ("large_split", ["large"], None, None, None), ("odd_split", ["odd"], True, None, None),
    ("edges", ["wide"], False, 448, 224), ("edges_split", ["odd"], True, 300, 100), ("smallest", ["tall"], False, 56, 14),
]
DEMO_ENCODES = [
    ("first", ["pictures/00a.png"], None, None, None), ("two", ["pictures/02a.png", "pictures/02b.png"], None, None, None),
    ("numbers", ["pictures/08.png"], False, None, None), ("split", ["pictures/04.png"], True, None, None),
    ("edges", ["pictures/09.png"], False, 112, 28),
]
LONG = "What is in this image? How many shapes are there? Is there a number? Which shape is leftmost, and which is rightmost?"


def text(value):
    return {"type": "text", "text": value}


def image(name):
    return {"type": "image", "path": name}


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


# name -> (messages or raw prompt with its pictures, options, new tokens). The window is 24: all but the first are longer.
CASES = {
    "text_short": ([user(text("Hi"))], {}, 8),
    "text": ([user(text(LONG))], {}, 48),
    "unicode": ([user(text("Grüße, 世界! 🙂 naïve\ttab\n\n  two  spaces"))], {}, 24),
    "system": ([{"role": "system", "content": [text("Answer in one word.")]}, user(text("What color is the ring?"))], {}, 24),
    "turns_text": ([user(text("How many shapes are there?")), assistant("Two shapes."), user(text("Is there a circle?"))], {}, 32),
    "image_first": ([user(image("square"), text("What is in this image?"))], {"split": False}, 40),
    "image_last": ([user(text("Describe this image:"), image("square"))], {"split": False}, 40),
    "image_alone": ([user(image("tiny"))], {"split": False}, 16),
    "large": ([user(image("large"), text("How many bars are there?"))], {"split": False}, 24),
    "wide": ([user(image("wide"), text("What is the number?"))], {"split": False}, 24),
    "narrow": ([user(image("narrow"), text("What color is the background?"))], {"split": False}, 24),
    "dot": ([user(image("dot"), text("Is there a circle?"))], {"split": False}, 24),
    "split_by_default": ([user(image("tall"), text("What is in this image?"))], {}, 32),
    "split": ([user(image("odd"), text("Which shape is leftmost?"))], {"split": True, "longest_edge": 500}, 24),
    "edges": ([user(image("wide"), text("How many shapes do you see?"))], {"split": False, "longest_edge": 448, "shortest_edge": 224}, 24),
    "adjacent": ([user(image("square"), image("other"), text("Which image has the cross?"))], {"split": False}, 32),
    "interleaved": ([user(text("First"), image("other"), text("then"), image("tiny"), text("and?"))], {"split": False}, 32),
    "turns": ([user(image("square"), text("What is in the first image?")), assistant("A pink ring."), user(image("other"), text("And in the second image?")),
               assistant("A blue cross."), user(text("Which image has the cross?"))], {"split": False}, 40),
    "same_twice": ([user(image("tiny"), text("and"), image("tiny"))], {"split": False}, 16),
    "raw_text": ("The shape is", [], {}, 32),
    "raw_image": ("In this image, we see<image>a shape, and here<image>", ["square", "tiny"], {"split": False}, 32),
    "raw_adjacent_split": ("<image><image> A", ["other", "tiny"], {"split": True, "longest_edge": 378}, 16),
}


def write_json(path, value):
    # Lists of numbers stay on one line, so that a changed case is a changed line.
    def lines(v, indent):
        pad = " " * indent
        if isinstance(v, dict) and v and len(json.dumps(v)) > 130:
            return "{\n" + ",\n".join(f'{pad} {json.dumps(k)}: {lines(x, indent + 1)}' for k, x in v.items()) + f"\n{pad}}}"
        if isinstance(v, list) and v and isinstance(v[0], (dict, list)) and len(json.dumps(v)) > 130:
            return "[\n" + ",\n".join(f"{pad} {lines(x, indent + 1)}" for x in v) + f"\n{pad}]"
        return json.dumps(v, ensure_ascii=False)

    path.write_text(lines(value, 0) + "\n")


def write_random(folder, state):
    """A folder that the reference loads."""
    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION), ("preprocessor_config.json", PREPROCESSOR), ("processor_config.json", PROCESSOR)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


class Runner:
    """Reference outputs of one checkpoint. `open_picture` maps a name to a PIL image."""

    def __init__(self, folder, open_picture):
        self.model, self.processor = reference.load(folder)
        self.default_split, self.default_size = self.processor.image_processor.do_image_splitting, dict(self.processor.image_processor.size)
        self.open_picture = open_picture

    def set_options(self, options):
        images = self.processor.image_processor
        images.do_image_splitting = self.default_split if options.get("split") is None else options["split"]
        images.size = {"longest_edge": options.get("longest_edge") or self.default_size["longest_edge"],
                       "shortest_edge": options.get("shortest_edge") or self.default_size["shortest_edge"]}

    def pixels(self, names):
        # The data format is given: the processor guesses wrong for pictures 1 or 3 pixels high.
        pictures = [[self.open_picture(n) for n in names]]
        return self.processor.image_processor(pictures, return_tensors="pt", input_data_format="channels_last")

    def image_tokens(self, names, options):
        """[sub-images x tokens, hidden], each sub-image by itself."""
        self.set_options(options)
        x = self.pixels(names)
        rows = []
        for pixels, mask in zip(x["pixel_values"][0], x["pixel_attention_mask"][0]):
            height, width = int(mask[:, 0].sum()), int(mask[0].sum())
            rows.append(self.model.model.get_image_features(pixels[None, None, :, :height, :width]))
        rows = torch.cat(rows)
        if len(x["pixel_values"][0]) > 1 and x["pixel_values"].shape[-1] < 600:
            padded = self.model.model.get_image_features(x["pixel_values"], x["pixel_attention_mask"])
            assert (padded - rows).norm() / rows.norm() < 1e-5, "padding changes the reference"
        return rows

    def generate(self, prompt, names, options, new_tokens):
        self.set_options(options)
        x = self.processor(text=prompt, return_tensors="pt")
        ids = x["input_ids"]
        tokens = self.image_tokens(names, options) if names else None
        embeds = self.model.get_input_embeddings()(ids)
        if names:
            assert int((ids == 601).sum()) == len(tokens), prompt
            embeds = self.model.model.inputs_merger(ids, embeds, tokens)
        g = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=GENERATION["eos_token_id"],
                                pad_token_id=0, suppress_tokens=SUPPRESSED, return_dict_in_generate=True, output_scores=True, output_logits=True,
                                **({"image_hidden_states": tokens} if names else {}))
        new = g.sequences[0][ids.shape[1]:].tolist()
        logits = torch.stack([step[0] for step in g.logits])
        self.check(embeds, new, logits)
        allowed = logits.clone()
        allowed[:, SUPPRESSED] = -torch.inf
        best = allowed.topk(2).values
        # Random weights come near a tie now and then: the case ends before it, since rounding decides what follows.
        near = (best[:, 0] - best[:, 1] <= SMALLEST_MARGIN).nonzero().flatten().tolist()
        if near:
            new, logits = new[: near[0]], logits[: near[0]]
        assert len(new) >= 8, "a near-tie within eight tokens: choose other words"
        logprobs = torch.log_softmax(logits, -1)
        allowed = logprobs.clone()
        allowed[:, SUPPRESSED] = -torch.inf
        top = allowed.topk(5)
        margin = float((top.values[:, 0] - top.values[:, 1]).min())
        suppressed_mass = float(logprobs[:, SUPPRESSED].exp().sum(-1).max())
        return {
            "prompt_token_ids": ids[0].tolist(), "image_tokens": int((ids == 601).sum()), "token_ids": new,
            "finish_reason": "stop" if new[-1] in GENERATION["eos_token_id"] else "length",
            "text": self.processor.tokenizer.decode(new, skip_special_tokens=True),
            "top5": [[[int(i), round(float(v), 5)] for i, v in zip(*step)] for step in zip(top.indices, top.values)],
            "smallest_margin": round(margin, 4),
        }, suppressed_mass

    def check(self, embeds, new, logits):
        """The cached, windowed generation equals one pass over everything under an explicit mask."""
        more = self.model.get_input_embeddings()(torch.tensor([new[:-1]], dtype=torch.long)) if len(new) > 1 else embeds[:, :0]
        whole = torch.cat([embeds, more], 1)
        n, window = whole.shape[1], self.model.config.text_config.sliding_window
        i, j = torch.arange(n)[:, None], torch.arange(n)
        mask = torch.where((j <= i) & (j > i - window), 0.0, torch.finfo(torch.float32).min)[None, None]
        hidden = self.model.model.text_model(inputs_embeds=whole, attention_mask=mask, use_cache=False).last_hidden_state
        again = self.model.lm_head(hidden[0, embeds.shape[1] - 1:])
        worst = float((again - logits).abs().max())
        assert worst < 2e-4, f"reference disagrees with itself by {worst}"


def encode_all(runner, encodes, out):
    tensors_out, listing = {}, []
    for name, pictures, split, longest, shortest in encodes:
        options = {k: v for k, v in (("split", split), ("longest_edge", longest), ("shortest_edge", shortest)) if v is not None}
        rows = runner.image_tokens(pictures, options)
        tensors_out[name] = rows.contiguous()
        listing.append({"name": name, "images": pictures, "options": options})
        print(f"{name:14} {tuple(rows.shape)} deviation {rows.std():.3f}, between rows {rows.std(0).mean():.3f}", flush=True)
    save_file(tensors_out, out / "image_tokens.safetensors")
    (out / "image_tokens.safetensors").chmod(0o644)
    write_json(out / "encodes.json", listing)
    return tensors_out


def main():
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    encode_all(Runner(DEMO, lambda n: Image.open(HERE / "demo" / n).convert("RGB")), DEMO_ENCODES, HERE / "demo")

    listing, state, digest = tensors(), {}, []
    for spec in listing:
        values = synthetic.weight(**spec)
        assert (torch.from_numpy(values).to(torch.bfloat16).float().numpy() == values).all() and (values.astype(np.float16) == values).all(), spec
        state[spec["name"]] = torch.from_numpy(values)
        digest.append(int(synthetic.checksum(values.view(np.uint32)), 16))
    print(f"{sum(v.numel() for v in state.values()) / 1e6:.2f} M parameters")
    RANDOM.mkdir(exist_ok=True)
    pictures = {n: synthetic.picture(*p) for n, p in PICTURES.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_random(pathlib.Path(folder), state)
        runner = Runner(folder, lambda n: Image.fromarray(pictures[n]))
    tokens = encode_all(runner, RANDOM_ENCODES, RANDOM)
    for a, b in (("square", "tiny"), ("large", "tall")):
        print(f"image tokens of {a} and {b} differ by {(tokens[a] - tokens[b]).norm() / tokens[a].norm():.3f}")

    cases = []
    for name, case in CASES.items():
        raw = isinstance(case[0], str)
        names = case[1] if raw else [p["path"] for m in case[0] for p in m["content"] if p["type"] == "image"]
        options, new_tokens = case[-2:]
        plain = None if raw else [{"role": m["role"], "content": [{"type": "image"} if p["type"] == "image" else p for p in m["content"]]} for m in case[0]]
        prompt = case[0] if raw else runner.processor.apply_chat_template(plain, add_generation_prompt=True)
        expected, suppressed = runner.generate(prompt, names, options, new_tokens)
        print(f"{name:18} prompt {len(expected['prompt_token_ids']):4} new {len(expected['token_ids']):3} {expected['finish_reason']:6} "
              f"distinct {len(set(expected['token_ids'])):3} margin {expected['smallest_margin']:.3f} suppressed {suppressed:.1e} first {expected['top5'][0][0]}", flush=True)
        assert suppressed < 2e-4, "the suppressed tokens must not count"
        cases.append({"name": name, **({"prompt": case[0], "images": names} if raw else {"messages": case[0]}), "options": options,
                      "max_new_tokens": new_tokens if expected["finish_reason"] == "stop" else len(expected["token_ids"]), **expected})

    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION), ("preprocessor_config.json", PREPROCESSOR), ("processor_config.json", PROCESSOR)):
        (RANDOM / name).write_text(json.dumps(value, indent=2) + "\n")
    write_json(RANDOM / "tensors.json", {"checksum": synthetic.checksum(np.array(digest, dtype=np.uint64)), "tensors": listing})
    write_json(RANDOM / "cases.json", {
        "pictures": {n: {"seed": s, "width": w, "height": h, "checksum": synthetic.checksum(pictures[n])} for n, (s, w, h) in PICTURES.items()},
        "cases": cases})


if __name__ == "__main__":
    main()
