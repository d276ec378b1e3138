"""From text to token ids, batches and micro-batches."""
