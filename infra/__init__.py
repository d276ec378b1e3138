"""Where the pipeline runs: set-up, images, and the servers as plain processes."""
