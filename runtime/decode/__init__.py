"""From a prompt to tokens: prefill, decode steps, sampling, and the record of what happened."""
