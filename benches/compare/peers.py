"""Builds and installs what Sconce is compared with, into a cache folder, once: llama.cpp natively
for this processor (from the source package of llama-cpp-python), its own quantisations of the
model, and a Python environment with ONNX Runtime and sentence-transformers. Knows no measurement.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

LLAMA = "llama-cpp-python==0.3.36"
PYTHON = ["onnxruntime", "onnx", "numpy", "tokenizers", "safetensors", "sentence-transformers"]
TARGETS = ["llama-server", "llama-bench", "llama-quantize", "llama-perplexity"]


def run(*command, **options):
    print("$", *command, file=sys.stderr, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


class Peers:
    """Where everything is. `llama` and `python` name what exists already."""

    def __init__(self, cache, llama=None, python=None):
        self.cache = Path(cache)
        self.cache.mkdir(parents=True, exist_ok=True)
        self.bin = Path(llama) if llama else self.cache / "llama.cpp" / "build" / "bin"
        self.python = Path(python) if python else self.cache / "venv" / "bin" / "python"

    def ensure_llama(self):
        """llama.cpp with GGML_NATIVE=ON, in Release."""
        if (self.bin / "llama-server").exists():
            return
        source = self.cache / "llama.cpp" / "source"
        source.mkdir(parents=True, exist_ok=True)
        tools = self.cache / "tools"
        if not (tools / "bin" / "cmake").exists():
            run(sys.executable, "-m", "venv", tools)
            run(tools / "bin" / "pip", "install", "-q", "cmake", "ninja")
        if not list(source.glob("llama_cpp_python-*.tar.gz")):
            run(
                tools / "bin" / "pip", "download", "-q", "--no-deps",
                "--no-binary", "llama-cpp-python", "-d", source, LLAMA,
            )
        archive = next(source.glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(source, filter="data")
        tree = next(source.glob("llama_cpp_python-*/vendor/llama.cpp"))
        build = self.cache / "llama.cpp" / "build"
        environment = {**os.environ, "PATH": f"{tools / 'bin'}:{os.environ['PATH']}"}
        run(
            "cmake", "-G", "Ninja", "-S", tree, "-B", build, "-DCMAKE_BUILD_TYPE=Release",
            "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", env=environment,
        )
        run("cmake", "--build", build, "--target", *TARGETS, env=environment)

    def ensure_python(self):
        """ONNX Runtime and sentence-transformers."""
        if not self.python.exists():
            run(sys.executable, "-m", "venv", self.python.parent.parent)
        known = "import onnxruntime, onnx, tokenizers, safetensors"
        if subprocess.run([self.python, "-c", known], capture_output=True).returncode != 0:
            run(self.python, "-m", "pip", "install", "-q", *PYTHON)

    def quantised(self, model, name):
        """The file `model`, requantised by llama.cpp to `name` (Q4_0, Q8_0): from its 4-bit values,
        for there is no other source, so its speed is that of the format, and its text is not
        judged."""
        to = self.cache / f"{Path(model).stem.rsplit('.', 1)[0]}.{name}.gguf"
        if not to.exists():
            tool = self.bin / "llama-quantize"
            if tool.exists():
                with open(self.cache / "quantise.log", "ab") as log:
                    command = [tool, "--allow-requantize", model, to, name, "2"]
                    run(*command, stdout=log, stderr=log)
            else:
                script = Path(__file__).parent / "quantise.py"
                environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(self.bin)}
                run(self.python, script, model, to, name, env=environment)
        return to


class Server:
    """A running server, ended at the end."""

    def __init__(self, command, log, cwd=None):
        self.log = open(log, "wb")
        self.process = subprocess.Popen(
            [str(part) for part in command], cwd=cwd, stdin=subprocess.DEVNULL,
            stdout=self.log, stderr=self.log,
        )

    def resident_bytes(self):
        """What it takes of memory now, and took at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        kib = dict(line.split(":")[:2] for line in status.splitlines())
        return tuple(int(kib[key].removesuffix("kB")) * 1024 for key in ["VmRSS", "VmHWM"])

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.log.close()
