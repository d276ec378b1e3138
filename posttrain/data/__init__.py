"""Turn text into token ids, batches and micro-batches."""
