"""Infrastructure of the pipeline: set-up, images, and the servers as plain processes."""
