"""What the teacher sees, its prompts, its weights and when they move."""
