"""EleutherAI's lm-evaluation-harness on bundles (extra `harness`): see README, "lm-evaluation-harness"."""
