"""Losses of recovery: next token, distillation of logits, experts and routers, load balance."""
