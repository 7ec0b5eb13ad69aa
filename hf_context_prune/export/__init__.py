"""Pruned models in other formats: quantised (Optimum, torchao), ONNX, GGUF; compared before they are kept."""
