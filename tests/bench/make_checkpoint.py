"""A checkpoint with the widths of idefics2-8b, random bf16 weights and as many layers as asked for.

    make_checkpoint.py DIR TEXT_LAYERS VISION_LAYERS            e.g. 4 27: 4.6 GB; 2 4: 3.2 GB; 32 27: the real size, 16.8 GB
    make_checkpoint.py DIR TEXT_LAYERS VISION_LAYERS narrow     less of everything but the sizes of heads: 2 2: 106 MB

Needs numpy only. config.json is as sparse as the hub's. The tokenizer has a token per character and fills up with names that no
text contains, so that a prompt's length is easy to choose; the ids that end a turn have zero rows in lm_head, so that an answer is
as long as asked for.
"""
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import struct
import sys

import numpy as np

VOCAB, HEAD, VISION_HEAD, SIDE = 32003, 128, 72, 70
LATENTS, PERCEIVER_HEAD, PERCEIVER_LAYERS = 64, 96, 3
FAKE, IMAGE, END_OF_UTTERANCE = 32000, 32001, 32002
SHARD_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Widths:
    """What may be less than in idefics2-8b."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vision_heads: int
    vision_mlp: int
    perceiver_heads: int
    perceiver_kv_heads: int
    shortest_edge: int
    # Of the weights. Where less is added up, larger ones keep attention from looking at everything alike.
    deviation: float

    @property
    def vision(self):
        return self.vision_heads * VISION_HEAD


REAL = Widths(hidden=4096, mlp=14336, heads=32, kv_heads=8, vision_heads=16, vision_mlp=4304, perceiver_heads=16, perceiver_kv_heads=4, shortest_edge=378, deviation=0.02)
NARROW = Widths(hidden=512, mlp=1024, heads=4, kv_heads=2, vision_heads=4, vision_mlp=592, perceiver_heads=4, perceiver_kv_heads=2, shortest_edge=56, deviation=0.06)
TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def shapes(widths, text_layers, vision_layers):
    """Every tensor's name and shape."""
    w, vision = widths, widths.vision
    p = "model.vision_model."
    yield p + "embeddings.patch_embedding.weight", (vision, 3, 14, 14)
    yield p + "embeddings.patch_embedding.bias", (vision,)
    yield p + "embeddings.position_embedding.weight", (SIDE * SIDE, vision)
    for i in range(vision_layers):
        q = f"{p}encoder.layers.{i}."
        for name, rows, cols in [(f"self_attn.{n}_proj", vision, vision) for n in ("q", "k", "v", "out")] + [("mlp.fc1", w.vision_mlp, vision), ("mlp.fc2", vision, w.vision_mlp)]:
            yield f"{q}{name}.weight", (rows, cols)
            yield f"{q}{name}.bias", (rows,)
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{q}{name}.weight", (vision,)
            yield f"{q}{name}.bias", (vision,)
    yield p + "post_layernorm.weight", (vision,)
    yield p + "post_layernorm.bias", (vision,)

    p = "model.connector.modality_projection."
    yield from ((p + "gate_proj.weight", (w.mlp, vision)), (p + "up_proj.weight", (w.mlp, vision)), (p + "down_proj.weight", (w.hidden, w.mlp)))
    p = "model.connector.perceiver_resampler."
    yield p + "latents", (LATENTS, w.hidden)
    q_width, kv_width = w.perceiver_heads * PERCEIVER_HEAD, w.perceiver_kv_heads * PERCEIVER_HEAD
    for i in range(PERCEIVER_LAYERS):
        yield from layer(f"{p}layers.{i}.", ("input_latents_norm", "input_context_norm", "post_attention_layernorm"), w.hidden, q_width, kv_width, 4 * w.hidden)
    yield p + "norm.weight", (w.hidden,)

    p = "model.text_model."
    yield p + "embed_tokens.weight", (VOCAB, w.hidden)
    for i in range(text_layers):
        yield from layer(f"{p}layers.{i}.", ("input_layernorm", "post_attention_layernorm"), w.hidden, w.heads * HEAD, w.kv_heads * HEAD, w.mlp)
    yield p + "norm.weight", (w.hidden,)
    yield "lm_head.weight", (VOCAB, w.hidden)


def layer(prefix, norms, hidden, q_width, kv_width, mlp):
    for name in norms:
        yield f"{prefix}{name}.weight", (hidden,)
    yield f"{prefix}self_attn.q_proj.weight", (q_width, hidden)
    yield f"{prefix}self_attn.k_proj.weight", (kv_width, hidden)
    yield f"{prefix}self_attn.v_proj.weight", (kv_width, hidden)
    yield f"{prefix}self_attn.o_proj.weight", (hidden, q_width)
    yield f"{prefix}mlp.gate_proj.weight", (mlp, hidden)
    yield f"{prefix}mlp.up_proj.weight", (mlp, hidden)
    yield f"{prefix}mlp.down_proj.weight", (hidden, mlp)


def pool(deviation):
    """Normal values in bf16: a tensor is a stretch of them, repeated. Their number is prime, so that no two rows of a matrix are
    equal."""
    values = np.random.default_rng(0).standard_normal(7_999_993, dtype=np.float32) * deviation
    return (values.view(np.uint32) >> 16).astype("<u2")


ONE = np.array([1.0], dtype=np.float32).view(np.uint32)[0] >> 16


def values(pool, name, shape, offset):
    """The elements, flat; `offset` is where the stretch of `pool` begins."""
    if len(shape) == 1:
        return np.full(shape, ONE if name.endswith("weight") else 0, dtype="<u2")
    out = np.empty(int(np.prod(shape)), dtype="<u2")
    at, start = 0, offset % len(pool)
    while at < len(out):
        piece = pool[start : start + len(out) - at]
        out[at : at + len(piece)] = piece
        at, start = at + len(piece), 0
    if name == "lm_head.weight":
        out.reshape(shape)[[2, END_OF_UTTERANCE, FAKE, IMAGE]] = 0
    return out


def write_weights(folder, pool, tensors):
    shards, size = [[]], 0
    for name, shape in tensors:
        nbytes = 2 * int(np.prod(shape))
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape, nbytes))
        size += nbytes
    weight_map, total, parts = {}, 0, []
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, nbytes in shard:
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
            weight_map[name] = file
            at += nbytes
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        (folder / file).write_bytes(struct.pack("<Q", len(head)) + head)
        for name, shape, nbytes in shard:
            parts.append((folder / file, 8 + len(head) + header[name]["data_offsets"][0], pool, name, shape, total))
            total += nbytes
    # Copies and writes leave Python's lock alone. Files have locks of their own: all shards are written at once.
    parts.sort(key=lambda part: part[1])
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count())) as threads:
        list(threads.map(write_tensor, parts))
    if len(shards) > 1:
        write(folder, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def write_tensor(part):
    file, at, *tensor = part
    with open(file, "r+b") as out:
        out.seek(at)
        out.write(values(*tensor).data)


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_tokenizer(folder):
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<fake_token_around_image>": FAKE, "<image>": IMAGE, "<end_of_utterance>": END_OF_UTTERANCE}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for character in ["▁", *map(chr, range(33, 127))]:
        vocab[character] = len(vocab)
    while len(vocab) < FAKE:
        vocab[f"⟨{len(vocab)}⟩"] = len(vocab)
    added = [{"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for c, i in special.items()]
    bos = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    write(folder, "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": bos, "pair": [*bos, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": []}})
    write(folder, "tokenizer_config.json", {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer", "processor_class": "Idefics2Processor"})
    write(folder, "chat_template.json", {"chat_template": TEMPLATE})


def make(folder, text_layers, vision_layers, widths=REAL):
    """Writes the folder; the bytes of its weights."""
    w = widths
    folder.mkdir(parents=True, exist_ok=True)
    given = lambda **sizes: {} if w == REAL else sizes
    write(folder, "config.json", {
        "architectures": ["Idefics2ForConditionalGeneration"], "model_type": "idefics2", "image_token_id": IMAGE, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "perceiver_config": {"model_type": "idefics2"} | given(hidden_size=w.hidden, resampler_n_heads=w.perceiver_heads, num_key_value_heads=w.perceiver_kv_heads),
        "text_config": {"model_type": "mistral", "max_position_embeddings": 32768, "num_hidden_layers": text_layers, "pad_token_id": 0, "rms_norm_eps": 1e-05, "vocab_size": VOCAB}
        | given(hidden_size=w.hidden, intermediate_size=w.mlp, num_attention_heads=w.heads, num_key_value_heads=w.kv_heads),
        "vision_config": {"model_type": "idefics2", "hidden_size": w.vision, "image_size": 14 * SIDE, "intermediate_size": w.vision_mlp, "num_attention_heads": w.vision_heads, "num_hidden_layers": vision_layers, "patch_size": 14}})
    write(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, END_OF_UTTERANCE], "pad_token_id": 0})
    write(folder, "preprocessor_config.json", {
        "do_convert_rgb": True, "do_image_splitting": False, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "Idefics2ImageProcessor", "processor_class": "Idefics2Processor", "resample": 2, "rescale_factor": 1 / 255, "size": {"longest_edge": 980, "shortest_edge": w.shortest_edge}})
    write(folder, "processor_config.json", {"image_seq_len": LATENTS, "processor_class": "Idefics2Processor"})
    write_tokenizer(folder)
    return write_weights(folder, pool(w.deviation), shapes(w, text_layers, vision_layers))


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or sys.argv[4:] not in ([], ["narrow"]):
        sys.exit(__doc__)
    nbytes = make(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), NARROW if sys.argv[4:] else REAL)
    print(f"{nbytes / 2e9:.2f} B parameters, {nbytes / 1e9:.2f} GB")
