"""GGUF files: header, configuration, tensors and tokenizer under Hugging Face's names."""
