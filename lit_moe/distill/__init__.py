"""Losses of recovery: next token, distillation from a teacher, load balance."""
