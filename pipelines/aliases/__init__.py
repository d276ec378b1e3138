"""Old module names of commands, on the path of `pipelines`."""
