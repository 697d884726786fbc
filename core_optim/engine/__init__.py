"""The machinery that every optimizer shares: options, state, kernels and the step itself."""
