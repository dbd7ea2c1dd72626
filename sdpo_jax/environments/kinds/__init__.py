"""The kinds of environment: one file per kind with its settings, its builder and its grader."""
