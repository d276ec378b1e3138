"""What is reported of a policy: its answers, and statistics over them."""
