"""Files and plug-ins of other tools: PEFT's adapters, ONNX, spandrel and what stands on it, ComfyUI."""
