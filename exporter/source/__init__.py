"""Where a model comes from: checkpoint, tokenizer, text documents, shipped configurations."""
