"""V-MoE: a Vision Transformer with sparse experts, as a Hugging Face model.

These files know torch and transformers only: every saved model carries a copy of them as remote
code, so that people without lit-moe can load it.
"""
