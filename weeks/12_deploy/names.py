"""What week 12's models and programs are called: in the logs, in tables and in plots."""

OWN, SMOL = "own", "smollm2"
NAMES = {"own": "week 6's model", "smollm2": "SmolLM2, fp32", "smollm2-int8": "SmolLM2, int8"}
PROGRAMS = {
    "pytorch": "PyTorch, shared.sampling",
    "transformers": "transformers",
    "onnx": "ONNX Runtime",
    "llama.cpp-F32": "llama.cpp, F32",
    "llama.cpp-F16": "llama.cpp, F16",
    "llama.cpp-Q8_0": "llama.cpp, Q8_0",
}
