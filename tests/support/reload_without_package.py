"""Run in a fresh process: reload saved folders with the package barred from import, and compare their logits.

``cases.json`` gives for each folder whether it needs remote code, and how far its logits may be from the saved ones (0:
no bit). The class without a head, by which servers open the folder, has to give the hidden states of the same model.
"""

import json
import sys
from pathlib import Path

from without_package import bar_package

folder = bar_package()

import torch
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
ids = torch.load(folder / "ids.pt")
cases = json.loads((folder / "cases.json").read_text())
for path, (remote, near) in cases.items():
    options = {"trust_remote_code": True} if remote else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    expected = torch.load(folder / f"{Path(path).name}.pt")
    if (logits - expected).abs().max() > near:
        sys.exit(f"{path}: logits differ by {(logits - expected).abs().max()}")
    auto_map = json.loads((Path(path) / "config.json").read_text()).get("auto_map", {})
    if remote and "AutoModel" not in auto_map:  # of an older version
        continue
    body = AutoModel.from_pretrained(path, dtype="auto", **options)
    with torch.no_grad():
        states, own = (one(input_ids=ids, attention_mask=torch.ones_like(ids))[0] for one in (body, model.base_model))
    if not torch.equal(states, own):
        sys.exit(f"{path}: hidden states differ by {(states - own).abs().max()}")
assert "hf_context_prune" not in sys.modules
print(json.dumps({"checked": len(cases)}))
