"""What the teacher sees, which weights it has, and its forward pass."""
