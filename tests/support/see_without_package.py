"""Run in a fresh process: reload models of images and text with the package barred from import, and show them one.

``cases.json`` gives for each folder whether it needs remote code.
"""

import json
import sys
from pathlib import Path

from without_package import bar_package

folder = bar_package()

import torch
from transformers import AutoModelForImageTextToText

torch.set_num_threads(1)
cases = json.loads((folder / "cases.json").read_text())
for path, remote in cases.items():
    options = {"trust_remote_code": True} if remote else {}
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", **options)
    inputs, expected = torch.load(folder / f"{Path(path).name}.pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    if not torch.equal(logits, expected):
        sys.exit(f"{path}: logits differ by {(logits - expected).abs().max()}")
assert "hf_context_prune" not in sys.modules
print(json.dumps({"checked": len(cases)}))
