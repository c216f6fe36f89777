"""What the numbers mean: floors from the card's measured rates, targets, and the table."""
import json
import math
import pathlib
import struct

import ops

MATRICES = ("_proj.weight", "fc1.weight", "fc2.weight", "patch_embedding.weight")


def shapes(checkpoint):
    """Every tensor's shape, from the headers of the weight files."""
    found = {}
    for file in sorted(pathlib.Path(checkpoint).glob("*.safetensors")):
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        found |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    return found


class Work:
    """Bytes and FLOPs that nobody gets around, of a checkpoint of make_checkpoint.py."""

    def __init__(self, checkpoint):
        self.config = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())
        self.shapes = shapes(checkpoint)

    def elements(self, prefix, suffixes=MATRICES):
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name.startswith(prefix) and name.endswith(tuple(suffixes)))

    @property
    def decode_bytes(self):
        """bf16 weights that every decode step reads: the layers and the head."""
        return 2 * (self.elements("model.text_model.layers.") + self.elements("lm_head", [".weight"]))

    @property
    def token_bytes(self):
        """Keys and values of a token in bf16."""
        layers = sum(name.endswith("self_attn.k_proj.weight") for name in self.shapes if name.startswith("model.text_model."))
        return 2 * 2 * layers * self.shapes["model.text_model.layers.0.self_attn.k_proj.weight"][0]

    def prefill_flop(self, tokens):
        """Products of all tokens with the layers and of the last with the head; causal attention, half of which is masked."""
        name = "model.text_model.layers.{}.self_attn.q_proj.weight"
        layers = sum(name.format(i) in self.shapes for i in range(1000))
        attention = 4 * layers * self.shapes[name.format(0)][0] * tokens * (tokens + 1) / 2
        return 2 * tokens * self.elements("model.text_model.layers.") + 2 * self.elements("lm_head", [".weight"]) + attention

    def vision_flop(self, grids):
        """For sub-images of as many patches as `grids` says."""
        width = self.shapes["model.vision_model.post_layernorm.weight"][0]
        vision, connector = "model.vision_model.", "model.connector."
        layers = sum(name.endswith("layer_norm1.weight") for name in self.shapes)
        latents = self.shapes[connector + "perceiver_resampler.latents"][0]
        perceiver = connector + "perceiver_resampler.layers."
        keys = self.elements(perceiver, ["k_proj.weight", "v_proj.weight"])
        queries = self.elements(perceiver) - keys
        depth = sum(name.startswith(perceiver) and name.endswith("q_proj.weight") for name in self.shapes)
        q_width = self.shapes[perceiver + "0.self_attn.q_proj.weight"][0]
        flop = 0
        for patches in grids:
            flop += 2 * patches * (self.elements(vision) + self.elements(connector + "modality_projection."))
            flop += 4 * layers * width * patches**2
            flop += 2 * latents * queries + 2 * (patches + latents) * keys + 4 * depth * q_width * latents * (patches + latents)
        return flop


def grids(picture, patch=14):
    """Patches of each sub-image of a case of cases.py."""
    return [(tile.shape[0] // patch) * (tile.shape[1] // patch) for tile in picture.tiles()]


def find(lines, **fields):
    """The line of a measurement; empty if it is not there."""
    return next((line for line in lines or [] if all(line.get(key) == value for key, value in fields.items())), {})


def measured_with(lines, changed):
    """The lines of the run of `idefics-engine-bench` that changed these flags; without any, those of `transformers` too."""
    return [line for line in lines or [] if line.get("changed", {}) == changed]


def ratio(a, b):
    return a / b if a and b else None


def speed_rows(plan, work, engine, peer):
    """A row for each measurement: milliseconds of ours, of theirs, and the floor that the card's measured rates set."""
    roofs = find(peer, kind="roofs")
    copy, matmul = roofs.get("copy_bytes_per_s"), roofs.get("matmul_flop_per_s")
    floor = lambda flop=0, nbytes=0: 1e3 * max(flop / matmul, nbytes / copy) if copy and matmul else None
    rows = []

    changes = {"with mma.sync": {"backend.attention": "mma"}, "without early launch": {"backend.early_launch": "false"}}
    changed = {words: measured_with(engine, change) for words, change in changes.items()}
    engine = measured_with(engine, {})

    def rows_of_changes(what, case, key):
        for words, lines in changed.items():
            ms = find(lines, **case).get(key)
            if ms:
                rows.append((f"  {what} {words}", ms, None, None))

    for picture in plan.speed_pictures:
        case = {"kind": "vision", "name": picture.name}
        rows.append((f"vision encode {picture.name}", find(engine, **case).get("ms"), find(peer, **case).get("ms"), floor(work.vision_flop(grids(picture)))))
        rows_of_changes(picture.name, case, "ms")
    for tokens in plan.prefill_tokens:
        case = {"kind": "prefill", "tokens": tokens}
        rows.append((f"first token, {tokens} tokens", find(engine, **case).get("ttft_ms"), find(peer, **case).get("ttft_ms"), floor(work.prefill_flop(tokens), work.decode_bytes)))
        rows_of_changes(f"{tokens} tokens", case, "ttft_ms")
    for batch, context in plan.decode:
        case = {"kind": "decode", "batch": batch, "context": context}
        nbytes = work.decode_bytes + batch * context * work.token_bytes
        rows.append((f"decode step {batch} x {context}", find(engine, **case).get("ms"), find(peer, **case).get("ms"), floor(nbytes=nbytes)))
        compiled = find(peer, kind="decode_compiled", batch=batch, context=context).get("ms")
        if compiled:
            rows.append((f"  {batch} x {context} beside compiled", find(engine, **case).get("ms"), compiled, None))
        rows_of_changes(f"{batch} x {context}", case, "ms")
    return [{"what": what, "ours_ms": a, "theirs_ms": b, "floor_ms": c} for what, a, b, c in rows]


def targets(plan, work, results):
    """Targets that could be measured: (what, value, comparison, limit)."""
    engine, peer = results.get("engine"), results.get("peer")
    rows = {row["what"]: row for row in speed_rows(plan, work, engine, peer)}
    copy = find(peer, kind="roofs").get("copy_bytes_per_s")
    context = plan.decode[0][1]
    most = max(batch for batch, c in plan.decode if c == context)
    one, many = rows[f"decode step 1 x {context}"], rows[f"decode step {most} x {context}"]
    compiled = rows.get(f"  1 x {context} beside compiled") or {}
    prefill = rows[f"first token, {plan.prefill_tokens[-1]} tokens"]
    vision = rows[f"vision encode {[p for p in plan.speed_pictures if not p.split][-1].name}"]
    sweep = results.get("serving") or []
    rate = 1e3 * work.decode_bytes / one["ours_ms"] if one["ours_ms"] else None
    return [
        ("batch 1 decode: weights over copy bandwidth", ratio(rate, copy), ">=", 0.85),
        ("batch 1 decode: times as fast as transformers", ratio(one["theirs_ms"], one["ours_ms"]), ">=", 2.5),
        ("batch 1 decode: times as fast as transformers, compiled", ratio(compiled.get("theirs_ms"), one["ours_ms"]), ">=", 1.0),
        (f"batch {most} decode step over batch 1", ratio(many["ours_ms"], one["ours_ms"]), "<=", 2.0),
        (f"prefill {plan.prefill_tokens[-1]}: of the matmul rate", ratio(prefill["floor_ms"], prefill["ours_ms"]), ">=", 0.6),
        (f"{vision['what']}: of the matmul rate", ratio(vision["floor_ms"], vision["ours_ms"]), ">=", 0.6),
        ("gateway adds to the first token, ms", sweep[0].get("added_ttft_ms") if sweep else None, "<", 2.0),
    ]


def met(value, comparison, limit):
    return {">=": value >= limit, "<=": value <= limit, "<": value < limit}[comparison]


def table(plan, work, results):
    """Everything, short."""
    number = lambda value, form=".2f": "-" if value is None else format(value, form)
    lines = ops.lines(results["ops"]) if results.get("ops") else []
    for row in results.get("parity") or []:
        verdict = "ok" if row["ok"] else "WRONG"
        detail = f"{row['ours']:.2e} off, transformers' bf16 {row['theirs']:.2e}" if isinstance(row["ours"], float) else ""
        lines.append(f"{row['what']:32} {verdict:6} {detail}")
    roofs = find(results.get("peer"), kind="roofs")
    if "copy_bytes_per_s" in roofs:
        lines.append(f"{roofs['device']}: copy {roofs['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 product {roofs['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s")
    for name in ("engine", "peer"):
        loads = [f"{line['engine']} {line['seconds']:.1f} s" for line in measured_with(results.get(name), {}) if line["kind"] == "load" and "seconds" in line]
        if loads:
            lines.append(f"load, {'idefics' if name == 'engine' else 'transformers'}: {', '.join(loads)}")
    if work and (results.get("engine") or results.get("peer")):
        lines.append(f"{'ms':32} {'idefics':>9} {'transf.':>9} {'ratio':>6} {'floor':>9} {'reached':>7}")
        for row in speed_rows(plan, work, results.get("engine"), results.get("peer")):
            a, b, c = row["ours_ms"], row["theirs_ms"], row["floor_ms"]
            lines.append(f"{row['what']:32} {number(a):>9} {number(b):>9} {number(ratio(b, a)):>6} {number(c):>9} {number(ratio(c, a)):>7}")
    for level in results.get("serving") or []:
        lines.append(
            f"{level['concurrency']:3} clients: {number(level['requests_per_s'])} requests/s, {number(level['tokens_per_s'], '.0f')} tokens/s, first token p50 {number(level['ttft_p50_ms'], '.1f')}"
            f" p99 {number(level['ttft_p99_ms'], '.1f')} ms, between tokens p50 {number(level['itl_p50_ms'], '.1f')} ms"
        )
    if work:
        for what, value, comparison, limit in targets(plan, work, results):
            verdict = "not measured" if value is None else "met" if met(value, comparison, limit) else "MISSED"
            lines.append(f"target: {what:56} {number(value):>7} {comparison:2} {limit:<5} {verdict}")
    for part, error in results["errors"].items():
        lines.append(f"FAILED {part}: {error}")
    return "\n".join(lines)
