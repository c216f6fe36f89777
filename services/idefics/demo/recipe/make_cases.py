"""Draw pictures that the training did not see, ask about them, and write what `transformers` answers: make_cases.py CKPT OUT SEED COUNT.

OUT gets pictures/*.png and cases.json: per case the images, the messages, the truth, and the reference's prompt token ids,
generated ids, text and first top-5 log-probabilities (greedy, f32). The pictures are three times the model's size, so the resize counts.
Needs tests/golden/reference.py (transformers 4.57.6).
"""
import json, pathlib, random, sys
import torch
from PIL import Image
HERE = pathlib.Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parents[3] / "tests/golden")]
import reference, scenes

checkpoint, out, seed, count = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
(out / "pictures").mkdir(parents=True, exist_ok=True)
model, processor = reference.load(checkpoint, split=False)
torch.set_grad_enabled(False)
eos = json.loads((pathlib.Path(checkpoint) / "generation_config.json").read_text())["eos_token_id"]
rng, cases, right, asked = random.Random(seed), [], 0, 0
for k in range(count):
    images, turns = scenes.compose(rng, 2)
    names = []
    for i, im in enumerate(images):
        names.append(f"pictures/{k:02d}{'ab'[i] if len(images) > 1 else ''}.png")
        im.resize((im.width * 3, im.height * 3), Image.Resampling.LANCZOS).save(out / names[-1], optimize=True)
    ims = [Image.open(out / n).convert("RGB") for n in names]
    messages, used = [], 0
    for parts, truth in turns[:3]:
        used += sum(not isinstance(p, str) for p in parts)
        messages.append({"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "path": names[p]} for p in parts]})
        plain = [{"role": m["role"], "content": [{"type": "image"} if p["type"] == "image" else p for p in m["content"]]} for m in messages]
        prompt = processor.apply_chat_template(plain, add_generation_prompt=True)
        x = processor(text=prompt, images=[ims[:used]], return_tensors="pt")
        g = model.generate(**x, max_new_tokens=40, do_sample=False, eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
        new = g.sequences[0][x["input_ids"].shape[1]:].tolist()
        text = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        top = torch.log_softmax(g.scores[0][0], -1).topk(5)
        margin = min(float(t[0] - t[1]) for t in (s[0].topk(2).values for s in g.scores))
        asked += 1; right += text == truth
        cases.append({"images": names[:used], "messages": json.loads(json.dumps(messages)), "truth": truth, "text": text, "prompt_token_ids": x["input_ids"][0].tolist(), "token_ids": new,
                      "first_top5": [[int(i), round(float(v), 5)] for i, v in zip(top.indices, top.values)], "smallest_margin": round(margin, 4)})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": truth}]})
(out / "cases.json").write_text(json.dumps({"seed": seed, "right": right, "asked": asked, "cases": cases}, ensure_ascii=False, indent=1) + "\n")
print(f"{right} of {asked} answers right, word for word")
