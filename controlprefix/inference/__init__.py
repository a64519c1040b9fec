"""From a request to text: resolving names, row plans, sampling, generation and batching."""
