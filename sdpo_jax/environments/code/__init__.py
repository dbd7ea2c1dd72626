"""Programming tasks: programs that a model wrote are run in the sandbox and judged outside it."""
