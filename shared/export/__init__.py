"""Week 12. The learner's model for everybody else's programs."""

from shared.export.gguf import to_gguf
from shared.export.huggingface import save_hf_folder
from shared.export.onnx import to_onnx

__all__ = ["save_hf_folder", "to_gguf", "to_onnx"]
