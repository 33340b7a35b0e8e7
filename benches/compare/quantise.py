"""Requantises a GGUF file through llama-cpp-python: `quantise.py FROM TO Q4_0`. For where only
llama.cpp's libraries are at hand, not its quantising tool."""

import ctypes
import sys

import llama_cpp

source, target, name = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = {"Q4_0": 2, "Q8_0": 7}[name]
options.allow_requantize = True
options.nthread = 2
status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
sys.exit(int(status))
