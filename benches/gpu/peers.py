"""What Sconce is compared with, each in a process of its own, which prints one line of JSON:

    python benches/gpu/peers.py bandwidth
    python benches/gpu/peers.py decode FOLDER --batch 64 --tokens 128
    python benches/gpu/peers.py embed FOLDER --length 128 --batch 64

Tokens come ready and go nowhere: what a server costs is not counted against a peer."""

import argparse
import json
import time


def settings(device):
    import torch

    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return torch, wait


def bandwidth(args):
    """Bytes a second that a copy within the device reads and writes."""
    torch, wait = settings(args.device)
    size = 1 << (32 if args.device == "cuda" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(8):
        wait()
        begun = time.perf_counter()
        target.copy_(source)
        wait()
        best = max(best, 2 * size / (time.perf_counter() - begun))
    return {"bytes_a_second": best}


def decode(args):
    """transformers with a static cache, compiled where that helps."""
    torch, wait = settings(args.device)
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    length = args.prompt + args.tokens + 1
    cache = StaticCache(config=model.config, max_cache_len=length)
    tokens = torch.randint(0, 256, (args.batch, args.prompt), device=args.device)

    def step(tokens, positions):
        answer = model(tokens, position_ids=positions[None].expand(len(tokens), -1),
                       cache_position=positions, past_key_values=cache, use_cache=True)
        return answer.logits[:, -1:].argmax(-1)

    run = torch.compile(step, mode="reduce-overhead") if args.compile else step
    place = torch.arange(args.prompt, device=args.device)
    with torch.inference_mode():
        token = step(tokens, place)
        place = place[-1:] + 1
        # The first ones compile and record.
        for _ in range(min(5, args.tokens // 2)):
            token, place = run(token, place).clone(), place + 1
        wait()
        begun, first = time.perf_counter(), int(place)
        while int(place) < length - 1:
            token, place = run(token, place).clone(), place + 1
        wait()
        seconds = time.perf_counter() - begun
    return {"tokens_a_second": args.batch * (length - 1 - first) / seconds}


def embed(args):
    """The module that sentence-transformers runs for such a model, and its mean."""
    torch, wait = settings(args.device)
    from transformers import AutoModel

    half = torch.float16 if args.device == "cuda" else torch.float32
    model = AutoModel.from_pretrained(args.folder, dtype=half, attn_implementation="sdpa")
    model = model.to(args.device).eval()
    tokens = torch.randint(0, 256, (args.batch, args.length), device=args.device)
    mask = torch.ones_like(tokens)

    def step():
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        return torch.nn.functional.normalize(hidden.mean(1), dim=-1).cpu()

    with torch.inference_mode():
        for _ in range(3):
            step()
        wait()
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < args.seconds:
            step()
            count += args.batch
        wait()
    return {"texts_a_second": count / (time.perf_counter() - begun)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["bandwidth", "decode", "embed"])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    found = {"bandwidth": bandwidth, "decode": decode, "embed": embed}[args.what](args)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
