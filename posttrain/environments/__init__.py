"""Tasks with a verifiable answer: one file each, with the rows, the answer and its judge side by side."""
