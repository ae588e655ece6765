"""Quantization methods on the same weights, without bundles: what each costs at each precision."""
