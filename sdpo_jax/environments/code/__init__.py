"""Parts of the kinds `code` and `nano_code`: problems, tests, comparison and feedback."""
