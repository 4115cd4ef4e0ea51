"""mlxquant: pull, plan, quantize, verify, time and chat with language models on your own Mac."""

__version__ = "0.1.0"
