"""What the inner loops of the kernels cost, counted in their machine code; needs no GPU:

    eval "$(.ci/cuda-toolchain)"; pip install nvidia-cuda-nvdisasm
    python benches/gpu/loops.py --nvdisasm PATH [--chip 90] [--only product]

For each kernel that uses tensor cores: registers, bytes that did not fit them, and of its loop all
instructions and those of tensor cores (HMMA). A processor's quarter begins one instruction a clock,
and a tensor instruction of 16 x 8 x 16 keeps it busy for some six: what goes far beyond that a
HMMA is time that tensor cores rest, unless memory is slower still."""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src/kernels/cuda/kernels.cu"


def compiled(chip, folder):
    """The machine code, and what the assembler says of each kernel."""
    cubin = Path(folder) / "kernels.cubin"
    command = [os.environ.get("NVCC", "nvcc"), "-std=c++17", "-O3", f"-arch=sm_{chip}", "-cubin"]
    command += ["-Xptxas", "-v", "-o", cubin, SOURCE]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = re.finditer(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return cubin, {match[1]: (int(match[3]), int(match[2])) for match in found}


def kernels(listing):
    """Name, instructions, and where labels stand among them."""
    parts = re.split(r"^\.text\.(\w+):\n", listing, flags=re.MULTILINE)
    for name, text in zip(parts[1::2], parts[2::2]):
        labels, code = {}, []
        for line in text.split("//-----")[0].splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                labels[label[1]] = len(code)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*)", line):
                code.append(found[1])
        yield name, code, labels


def loop(code, labels):
    """The shortest loop that has tensor instructions: how many, and how many in all."""
    best = None
    for end, line in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        start = labels.get(target[1]) if target else None
        if start is None or start > end:
            continue
        tensor = sum("HMMA" in of for of in code[start : end + 1])
        if tensor and (best is None or end + 1 - start < best[1]):
            best = tensor, end + 1 - start
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nvdisasm", default="nvdisasm")
    parser.add_argument("--chip", default="90")
    parser.add_argument("--only", default="", help="kernels whose names begin so")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cubin, resources = compiled(args.chip, folder)
        listing = subprocess.run(
            [args.nvdisasm, "-c", cubin], check=True, capture_output=True, text=True
        ).stdout
    print("| kernel | registers | spilled | HMMA | instructions | a HMMA |")
    print("|---|---|---|---|---|---|")
    for name, code, labels in sorted(kernels(listing)):
        best = loop(code, labels)
        if best and name.startswith(args.only):
            registers, spilled = resources[name]
            tensor, whole = best
            figures = [registers, spilled, tensor, whole, f"{whole / tensor:.1f}"]
            print("|", " | ".join(map(str, [name, *figures])), "|")


if __name__ == "__main__":
    main()
