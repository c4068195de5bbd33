"""Week 12. A GPT of the course for other programs: a Hugging Face folder, a GGUF file, an ONNX file."""

from shared.export.gguf import to_gguf
from shared.export.huggingface import save_hf_folder
from shared.export.onnx import to_onnx

__all__ = ["save_hf_folder", "to_gguf", "to_onnx"]
