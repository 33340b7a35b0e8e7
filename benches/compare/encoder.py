"""One encoder peer in a process of its own: reads `{"texts": […], "batch": n, "seconds": s}` a
line, encodes batches of texts again and again for that long, and answers `{"texts": n,
"seconds": s, "vectors": […]}`. In process, without HTTP: what a peer's server would cost is not
counted against it. Texts are tokenised each time, as a server would."""

import json
import sys
import time
from pathlib import Path

import numpy

THREADS = 2


def sentence_transformers(folder):
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(THREADS)
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(
        texts, batch_size=len(texts), normalize_embeddings=True, show_progress_bar=False
    )


def onnx_runtime(folder, dynamic):
    import onnxruntime
    from tokenizers import Tokenizer

    from graph import export

    path = export(folder, Path(sys.argv[3]), dynamic)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()

    def encode(texts):
        coded = tokenizer.encode_batch(texts)
        ids = numpy.array([code.ids for code in coded], dtype=numpy.int64)
        mask = numpy.array([code.attention_mask for code in coded], dtype=numpy.int64)
        (hidden,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
        weight = mask[:, :, None].astype(numpy.float32)
        mean = (hidden * weight).sum(axis=1) / weight.sum(axis=1)
        return mean / numpy.linalg.norm(mean, axis=1, keepdims=True)

    return encode


def main():
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind == "sentence-transformers":
        encode = sentence_transformers(folder)
    else:
        encode = onnx_runtime(folder, dynamic=kind == "onnxruntime-int8")
    encode(["warm up"] * 4)
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        texts, batch = task["texts"], task["batch"]
        batches = [texts[i : i + batch] for i in range(0, len(texts), batch)]
        vectors = encode(batches[0])
        done, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < task["seconds"]:
            encode(batches[done % len(batches)])
            done += 1
        answer = {
            "texts": done * batch,
            "seconds": time.perf_counter() - begun,
            "vectors": numpy.asarray(vectors).tolist(),
        }
        print(json.dumps(answer), flush=True)


main()
