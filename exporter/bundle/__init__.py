"""The bundle on disk: layout of the weights, resumable work folder, kernels, model card."""
