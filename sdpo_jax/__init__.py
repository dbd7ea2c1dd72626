"""Self-Distillation Policy Optimization in JAX."""
