"""Evaluation: held-out accuracy of student and teacher."""
